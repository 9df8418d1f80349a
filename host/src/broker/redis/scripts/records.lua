#!lua flags=no-writes,allow-oom
-- Reads the first of several records, up to a size: together they may have 64 MiB.
-- KEYS: the records.
-- ARGV: bytes after which the call ends.
-- Returns the records of the first keys, at least one; false for an absent one.
local n, bytes = 0, 0
repeat
  n = n + 1
  bytes = bytes + redis.call('STRLEN', KEYS[n])
until n == #KEYS or bytes >= tonumber(ARGV[1])
return redis.call('MGET', unpack(KEYS, 1, n))
