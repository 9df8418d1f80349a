"""A client that `openapi-python-client` generates from the document of a node publishes and reads.
Run by tests/clients.rs."""

import importlib
import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import requests

from node_under_test import ADDRESS, page_of

# The bodies of plugin files and lists of lines have content types that the generator does not know;
# its configuration says how to treat them.
CONFIG = {
    "content_type_overrides": {
        "application/wasm": "application/octet-stream",
        "application/toml": "application/octet-stream",
        "application/x-ndjson": "text/plain",
        "application/openmetrics-text": "text/plain",
    },
    "post_hooks": [],
}


def generate(folder, config):
    url = f"http://{ADDRESS}/v1/openapi.json"
    config_file = Path(folder) / "config.json"
    config_file.write_text(json.dumps(config))
    tool = Path(sys.executable).parent / "openapi-python-client"
    command = [tool, "generate", "--url", url, "--meta", "none", "--overwrite"]
    command += ["--config", config_file, "--output-path", Path(folder) / "generated"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class GeneratedClient(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        sys.path.insert(0, cls.folder.name)
        generate(cls.folder.name, CONFIG)

    def test_every_operation_is_generated_and_can_be_imported(self):
        document = requests.get(f"http://{ADDRESS}/v1/openapi.json", timeout=60).json()
        operations = [
            (operation["tags"][0], operation["operationId"])
            for item in document["paths"].values()
            for method, operation in item.items()
            if method != "parameters"
        ]
        self.assertGreater(len(operations), 30)
        for tag, operation in operations:
            name = "".join(f"_{c.lower()}" if c.isupper() else c for c in operation)
            module = importlib.import_module(f"generated.api.{tag}.{name}")
            self.assertTrue(callable(module.sync_detailed), name)
        importlib.import_module("generated.models")

    def test_it_publishes_and_reads(self):
        from generated import Client
        from generated.api.application import open_stream, publish_events, read_notifications
        from generated.models import CloudEvent, Error, NotificationPage, PublishError, Stored

        client = Client(base_url=f"http://{ADDRESS}", raise_on_unexpected_status=True)
        user = "reader-of-openapi-python-client"
        with client.get_httpx_client().stream(**open_stream._get_kwargs() | {"params": {"user": user}}) as stream:
            event = CloudEvent(type_="client.test", id="generated", source="/generated", data={"n": 1})
            event["user"] = user
            stored = publish_events.sync(client=client, body=event)
            self.assertIsInstance(stored, Stored)
            self.assertEqual(stored.id, "generated")
            lines = (line for line in stream.iter_lines() if line.startswith("data: "))
            self.assertEqual(json.loads(next(lines)[len("data: ") :])["data"], {"n": 1})
        # In dev mode the user is a parameter; otherwise it is in the token.
        client.get_httpx_client().params = {"user": user}
        page = read_notifications.sync(client=client, limit=10)
        self.assertIsInstance(page, NotificationPage)
        self.assertEqual([item.data.id for item in page.notifications], ["generated"])
        self.assertEqual(page.notifications[0].data.data, page_of(user)[0]["data"])
        client.get_httpx_client().params = {}
        refused = publish_events.sync(client=client, body=CloudEvent(type_=""))
        self.assertIsInstance(refused, PublishError)
        self.assertIn("type is empty", refused.error)
        self.assertIsInstance(read_notifications.sync(client=client), Error)


class WithoutConfiguration(unittest.TestCase):
    def test_it_is_generated_and_publishes(self):
        # In a process of its own, because the package has the same name.
        with tempfile.TemporaryDirectory() as folder:
            generate(folder, {"post_hooks": []})
            script = f"""
from generated import Client
from generated.api.application import open_stream, publish_events
from generated.models import CloudEvent
body = CloudEvent(type_="client.test", id="plain")
print(publish_events.sync(client=Client(base_url="http://{ADDRESS}"), body=body).id)
"""
            done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
            self.assertEqual(done.stdout, "plain\n", done.stderr)


if __name__ == "__main__":
    unittest.main()
