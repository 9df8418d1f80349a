"""The requests of the CloudEvents SDK for Python (PyPI `cloudevents`), its current and its former
interface, in each content mode, compressed and not. Run by tests/clients.rs."""

import gzip
import json
import unittest
import zlib

import requests
from cloudevents.core.bindings.http import to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from cloudevents.v1 import http as former

from node_under_test import ADDRESS, page_of

URL = f"http://{ADDRESS}/v1/events"
USER = "reader-of-pypi-cloudevents"
SCHEMA = "https://shop.example/" + "s" * 2000
BYTES = bytes([0, 159, 146, 150])


def attributes(name, **more):
    source = "/pypi/" + "s" * 2000
    return {"id": name, "source": source, "type": "client.test", "subject": "ä/" + "p" * 2000, "user": USER, **more}


def send(headers, body, compress=None, coding=None):
    headers = dict(headers)
    if compress:
        headers["Content-Encoding"] = coding
        body = compress(body)
    return requests.post(URL, headers=headers, data=body, timeout=60)


class SdkRequests(unittest.TestCase):
    def read(self, name):
        return next(item for item in page_of(USER) if item["id"] == name)

    def assert_read(self, name, **members):
        read = self.read(name)
        self.assertEqual(read["source"], "/pypi/" + "s" * 2000)
        for member, value in members.items():
            self.assertEqual(read.get(member), value, member)

    def test_each_mode_and_coding(self):
        data = {"text": "zwölf", "n": 7}
        for mode, convert in (("structured", to_structured), ("binary", to_binary)):
            for coding, compress in ((None, None), ("gzip", gzip.compress), ("deflate", zlib.compress)):
                with self.subTest(mode=mode, coding=coding):
                    name = f"{mode}-{coding}"
                    event = CloudEvent(attributes(name, datacontenttype="application/json", dataschema=SCHEMA), data)
                    message = convert(event, JSONFormat())
                    answer = send(message.headers, message.body, compress, coding)
                    self.assertEqual(answer.status_code, 202, answer.text)
                    self.assert_read(
                        name, data=data, datacontenttype="application/json", dataschema=SCHEMA, subject="ä/" + "p" * 2000
                    )

    def test_bytes_without_a_type_are_bytes(self):
        event = CloudEvent(attributes("bytes"), BYTES)
        message = to_structured(event, JSONFormat())
        self.assertNotIn(b"datacontenttype", message.body)
        self.assertEqual(send(message.headers, message.body).status_code, 202)
        self.assert_read("bytes", data_base64="AJ+Slg==", datacontenttype=None)

    def test_a_batch_in_which_every_event_is_refused_fails(self):
        headers = {"Content-Type": "application/cloudevents-batch+json"}
        good = [JSONFormat().write(CloudEvent(attributes(f"batch-{n}"), n)).decode() for n in range(2)]
        answer = send(headers, f"[{','.join(good)}]".encode(), gzip.compress, "gzip")
        self.assertEqual((answer.status_code, len(answer.json()["events"])), (200, 2))
        refused = [json.dumps({**json.loads(one), "user": "a\nb"}) for one in good]
        answer = send(headers, f"[{','.join(refused)}]".encode())
        self.assertEqual((answer.status_code, len(answer.json()["events"])), (400, 2))

    def test_a_minimal_response_has_no_body(self):
        message = to_binary(CloudEvent(attributes("minimal", datacontenttype="text/plain"), "text"), JSONFormat())
        answer = send({**message.headers, "Prefer": "return=minimal"}, message.body)
        self.assertEqual((answer.status_code, answer.content), (204, b""))
        self.assert_read("minimal", data="text", datacontenttype="text/plain")

    def test_the_former_interface(self):
        for mode, convert in (("structured", former.to_structured), ("binary", former.to_binary)):
            with self.subTest(mode=mode):
                event = former.CloudEvent(attributes(f"former-{mode}", subject="s"), {"n": 1})
                self.assertEqual(send(*convert(event)).status_code, 202)
                self.assert_read(f"former-{mode}", data={"n": 1})

    def test_text_in_another_encoding_is_refused(self):
        text = "schön"
        event = CloudEvent(attributes("latin", datacontenttype="text/plain; charset=iso-8859-1"), text.encode("latin-1"))
        message = to_binary(event, JSONFormat())
        self.assertEqual(send(message.headers, message.body).status_code, 415)
        document = to_structured(CloudEvent(attributes("utf-16"), "x"), JSONFormat())
        answer = send(document.headers, document.body.decode().encode("utf-16"))
        self.assertEqual(answer.status_code, 400)
        self.assertIn("is UTF-16", answer.json()["error"])


if __name__ == "__main__":
    unittest.main()
