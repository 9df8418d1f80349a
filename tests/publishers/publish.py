"""Publishes messages to Redis with redis-py: a JSON list of [command, channel, message] as the only
argument. REDIS_URL names the server."""

import json
import os
import sys

import redis

client = redis.Redis.from_url(os.environ["REDIS_URL"])
for command, channel, message in json.loads(sys.argv[1]):
    publish = client.spublish if command == "spublish" else client.publish
    receivers = publish(channel, message)
    if receivers != 1:
        raise SystemExit(f"{command} {channel}: {receivers} receivers")
