#!lua flags=allow-oom
-- Releases the lease if this node holds it.
-- ARGV: node.
local key = T .. 'owner'
if call('GET', key) == ARGV[OWN] then call('DEL', key) end
return 'ok'
