"""The node that tests/clients.rs started, and helpers to publish to it and read from it."""

import os
import time

import requests

ADDRESS = os.environ["POINTSMAN_ADDRESS"]


def publish(user, name, **more):
    """Publishes one event to a user."""
    event = {"specversion": "1.0", "id": name, "source": "/clients", "type": "client.test", "user": user, **more}
    headers = {"Content-Type": "application/cloudevents+json"}
    answer = requests.post(f"http://{ADDRESS}/v1/events", json=event, headers=headers, timeout=60)
    assert answer.status_code == 202, answer.text


def page_of(user):
    """The data of every notification of a user, once everything that was published is decided."""
    last = f"last-{time.monotonic_ns()}"
    publish(user, last)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        page = requests.get(f"http://{ADDRESS}/v1/notifications?user={user}&limit=1000", timeout=60).json()
        items = [item["data"] for item in page["notifications"]]
        if any(item["id"] == last for item in items):
            return items
        time.sleep(0.02)
    raise AssertionError(f"{last} does not arrive")
