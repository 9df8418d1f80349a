#!lua flags=allow-oom
-- Registers a node and returns the others. Removes those that have not registered again in time.
-- KEYS: 1 the hash of nodes.
-- ARGV: name; address; time to live of an entry, ms; most nodes to return.
-- Returns {name, address, name, address, ...}.
local nodes, name, address = KEYS[1], ARGV[1], ARGV[2]
local ttl, most = tonumber(ARGV[3]), tonumber(ARGV[4])
require_rights({{'HGETALL', nodes}, {'HSET', nodes, 'f', 'v'}, {'HDEL', nodes, 'f'}})
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local others = {}
local found = redis.call('HGETALL', nodes)
for i = 1, #found, 2 do
  local ms, at = string.match(found[i + 1], '^(%d+) (%S+)$')
  -- An entry of the future was written before the clock was set back.
  if not ms or math.abs(now - tonumber(ms)) > ttl then
    redis.call('HDEL', nodes, found[i])
  elseif found[i] ~= name and #others < 2 * most then
    others[#others + 1] = found[i]
    others[#others + 1] = at
  end
end
redis.call('HSET', nodes, name, string.format('%.0f', now) .. ' ' .. address)
return others
