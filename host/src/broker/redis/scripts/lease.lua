#!lua flags=allow-oom
-- Takes or renews the lease.   ARGV  node, time to live in ms.   Answers 0, or for how many ms another node has it.
local node, ttl = ARGV[OWN], ARGV[OWN + 1]
local key = T .. 'owner'
local owner = call('GET', key)
if owner and owner ~= node then return math.max(1, call('PTTL', key)) end
call('SET', key, node, 'PX', ttl)
return 0
