#!lua flags=no-writes,allow-oom
-- Lists the nodes that have registered in time.
-- KEYS: 1 the hash of nodes.
-- ARGV: time to live of an entry, ms; most nodes to return.
-- Returns {name, ...}.
local ttl, most = tonumber(ARGV[1]), tonumber(ARGV[2])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local live, cursor = {}, '0'
repeat
  local page = redis.call('HSCAN', KEYS[1], cursor, 'COUNT', 100)
  cursor = page[1]
  for i = 1, #page[2], 2 do
    local ms = string.match(page[2][i + 1], '^(%d+) %S+$')
    if ms and math.abs(now - tonumber(ms)) <= ttl and #live < most then live[#live + 1] = page[2][i] end
  end
until cursor == '0' or #live >= most
return live
