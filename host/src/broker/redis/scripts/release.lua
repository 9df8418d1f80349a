#!lua flags=allow-oom
-- Gives the lease back if it is this node's.   ARGV  node.
local key = T .. 'owner'
if call('GET', key) == ARGV[OWN] then call('DEL', key) end
return 'ok'
