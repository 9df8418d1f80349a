"""Python's readers of Server-Sent Events receive every notification, with the text that was
published. `httpx-sse` splits lines as `str.splitlines` does. Run by tests/clients.rs."""

import json
import os
import unittest

import httpx
import httpx_sse
import requests
import sseclient

from node_under_test import ADDRESS, page_of, publish

# Every character at which `str.splitlines` ends a line, and `\r\n`.
ENDS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
TEXTS = [f"before{end}after{end}" for end in ENDS] + ["«no end»: “quoted” – 100 €"]
# In a name, those that are not control characters.
USER = "line\u2028paragraph\u2029"


def by_sseclient(url):
    answer = requests.get(url, stream=True, timeout=60, headers={"Accept": "text/event-stream"})
    return sseclient.SSEClient(answer).events()


def by_httpx(url):
    with httpx.Client(timeout=60) as client, httpx_sse.connect_sse(client, "GET", url) as source:
        yield from source.iter_sse()


class Readers(unittest.TestCase):
    def test_every_text_arrives_as_published(self):
        for name, read in (("sseclient-py", by_sseclient), ("httpx-sse", by_httpx)):
            with self.subTest(name):
                user = f"{name}-{USER}"
                events = read(httpx.URL(f"http://{ADDRESS}/v1/stream", params={"user": user}).__str__())
                self.assertEqual(next(events).event, "cursor")
                for n, text in enumerate(TEXTS):
                    # An object, a plain text, and bytes that are a text.
                    publish(user, f"{name}-{n}-json", data={"text": text, text: 1})
                    publish(user, f"{name}-{n}-text", datacontenttype="text/plain", data=text)
                    publish(user, f"{name}-{n}-none", data=text)
                for n, text in enumerate(TEXTS):
                    for kind, data in (("json", {"text": text, text: 1}), ("text", text), ("none", text)):
                        event = next(events)
                        self.assertEqual(event.event, "message")
                        read_data = json.loads(event.data)
                        self.assertEqual((read_data["id"], read_data["data"]), (f"{name}-{n}-{kind}", data))
                        self.assertEqual(read_data["to"], f"u:{user}")

    def test_an_event_name_ends_no_line(self):
        events = by_httpx(f"http://{ADDRESS}/v1/stream?user=named")
        self.assertEqual(next(events).event, "cursor")
        publish(None, "named", type="named")
        event = next(events)
        self.assertEqual((event.event, json.loads(event.data)["id"]), ("first second third", "named"))

    def test_each_exported_event_is_one_line(self):
        for n, text in enumerate(TEXTS):
            publish("exported", f"exported-{n}", data=text)
        self.assertGreaterEqual(len(page_of("exported")), len(TEXTS))
        export = requests.get(f"http://{os.environ['POINTSMAN_ADMIN']}/v1/events?limit=10000", timeout=60).text
        exported = {event["id"]: event for event in map(json.loads, export.splitlines())}
        for n, text in enumerate(TEXTS):
            self.assertEqual(exported[f"exported-{n}"]["data"], text)


if __name__ == "__main__":
    unittest.main()
