#!lua flags=allow-oom
-- Takes or renews the lease, unless the user lacks a right that a commit needs.
-- ARGV: node; time to live, ms.
-- Returns 0, or the milliseconds for which another node still holds the lease.
require_commit_rights()
local node, ttl = ARGV[OWN], ARGV[OWN + 1]
local key = T .. 'owner'
local owner = call('GET', key)
if owner and owner ~= node then return math.max(1, call('PTTL', key)) end
call('SET', key, node, 'PX', ttl)
return 0
