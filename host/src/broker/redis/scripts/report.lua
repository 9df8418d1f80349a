#!lua flags=allow-oom
-- Publishes the report of a node. A node that cannot report must not decide, so a full Redis accepts
-- it, and a key of another type is replaced.
-- KEYS: 1 the key of the report.
-- ARGV: the report; its time to live, ms.
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
