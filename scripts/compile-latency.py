#!/usr/bin/env python3
"""Measures the latency of live notifications with and without a plugin being compiled, in one run.

    scripts/compile-latency.py target/release/pointsman build/plugins [--rate 500] [--seconds 10]

Starts a node in memory, publishes events to one stream, and alternates between phases without and
phases with a file that compiles for minutes in the plugin folder (`address` with one large function). Prints p50 and p99 of both, and
their ratio. Needs only the Python standard library.
"""

import argparse
import http.client
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time

PHASES = 3


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def leb(number):
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def unleb(data, at):
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at


def slow_module(module, variables):
    """A core module with one more function, whose variables are all in use at its end."""
    numbers = range(1, variables + 1)
    # i64.const n, but of at least 64 a second byte, so that it is not negative.
    constant = lambda n: b"\x42" + leb(n | 0x100000)
    body = b"".join(b"\x20\x00" + constant(n) + b"\x7e\x21" + leb(n) for n in numbers)
    used = b"".join(b"\x20\x00\x20" + leb(n) + b"\x85\x21\x00" for n in numbers)
    body += b"\x03\x40" + used + b"\x20\x00\x50\x0d\x00\x0b" + used + b"\x20\x00\x0b"
    body = b"\x01" + leb(variables) + b"\x7e" + body
    added, n_types = {10: leb(len(body)) + body}, 0
    at, sections = 8, []
    while at < len(module):
        kind = module[at]
        size, start = unleb(module, at + 1)
        at = start + size
        sections.append((kind, module[start:at]))
    (n_types, _) = next(unleb(content, 0) for kind, content in sections if kind == 1)
    added[1] = b"\x60\x01\x7e\x01\x7e"
    added[3] = leb(n_types)
    written = module[:8]
    for kind, content in sections:
        if kind in added:
            count, rest = unleb(content, 0)
            content = leb(count + 1) + content[rest:] + added[kind]
        written += bytes([kind]) + leb(len(content)) + content
    return written


def ask(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def wait_for(what, condition, seconds=120):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise SystemExit(f"timed out: {what}")


class Arrivals(threading.Thread):
    """Reads a stream and notes when each event arrived."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.at = {}
        self.stream = http.client.HTTPConnection("127.0.0.1", port)
        self.stream.request("GET", "/v1/stream?user=7")
        self.lines = self.stream.getresponse()

    def run(self):
        for line in self.lines:
            if line.startswith(b"data:"):
                now = time.monotonic()
                # The `data` of a frame that only carries a cursor is empty.
                event = json.loads(line[5:].strip() or b"{}")
                if "id" in event:
                    self.at[event["id"]] = now


def phase(name, port, arrivals, rate, seconds):
    """Publishes at a constant rate and returns the latencies in ms."""
    publisher = http.client.HTTPConnection("127.0.0.1", port)
    sent = {}
    batch = max(1, rate // 50)
    next_at = time.monotonic()
    until = next_at + seconds
    while time.monotonic() < until:
        events = []
        for _ in range(batch):
            key = f"{name}-{len(sent)}"
            sent[key] = time.monotonic()
            events.append({"specversion": "1.0", "id": key, "source": "/latency", "type": "t", "user": "7", "data": {}})
        body = json.dumps(events)
        publisher.request("POST", "/v1/events", body, {"content-type": "application/cloudevents-batch+json"})
        publisher.getresponse().read()
        next_at += batch / rate
        time.sleep(max(0.0, next_at - time.monotonic()))
    wait_for("the last event", lambda: all(key in arrivals.at for key in sent))
    return [(arrivals.at[key] - at) * 1000 for key, at in sent.items()]


def quantile(values, q):
    values = sorted(values)
    return values[min(len(values) - 1, int(q * len(values)))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pointsman")
    parser.add_argument("plugins")
    parser.add_argument("--rate", type=int, default=500, help="events per second")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a phase")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plugins = os.path.join(folder, "plugins")
        shutil.copytree(options.plugins, plugins)
        slow = os.path.join(folder, "slow.wasm")
        with open(os.path.join(plugins, "address.wasm"), "rb") as address:
            module = slow_module(address.read(), 49_000)
        with open(slow, "wb") as file:
            file.write(module)
        port, admin = free_port(), free_port()
        command = [options.pointsman, "serve", "--dev", "--ephemeral", "--plugins", plugins]
        command += ["--listen", f"127.0.0.1:{port}", "--admin", f"127.0.0.1:{admin}"]
        environment = {**os.environ, "POINTSMAN_PLUGINS_CACHE": os.path.join(folder, "cache")}
        with open(os.path.join(folder, "log"), "wb") as log:
            node = subprocess.Popen(command, env=environment, stderr=log)
        try:
            wait_for("the node is ready", lambda: ask(admin, "/readyz")[0] == 200)
            arrivals = Arrivals(port)
            arrivals.start()
            phase("warm-up", port, arrivals, options.rate, 2)
            target = os.path.join(plugins, "slow.wasm")
            latencies = {"idle": [], "compiling": []}
            for n in range(PHASES):
                latencies["idle"] += phase(f"idle-{n}", port, arrivals, options.rate, options.seconds)
                shutil.copy(slow, target)
                compiling = lambda: '"compiling"' in ask(admin, "/v1/plugins")[1]
                wait_for("the file is being compiled", compiling)
                latencies["compiling"] += phase(f"compiling-{n}", port, arrivals, options.rate, options.seconds)
                if not compiling():
                    raise SystemExit("the file was compiled within the phase")
                os.remove(target)
                wait_for("the compilation is stopped", lambda: not compiling())
            p99 = {name: quantile(values, 0.99) for name, values in latencies.items()}
            for name, values in latencies.items():
                print(f"{name:<10} p50 {quantile(values, 0.5):7.2f} ms  p99 {p99[name]:7.2f} ms  ({len(values)} events)")
            print(f"ratio of p99: {p99['compiling'] / p99['idle']:.2f}")
        finally:
            node.terminate()
            node.wait()


if __name__ == "__main__":
    main()
