#!lua flags=allow-oom
-- Takes or renews the lease of the listener of a bridge. Times are of the clock of Redis.
-- ARGV: bridge; session; ms since its subscription last worked, '' without one; node; time to live, ms.
-- Returns {1, whether another session did not release it, ms since a listener was last subscribed}
-- or {0, 0, ms for which another session still holds it, its node}.
local key, session, silent = T .. 'bridge:' .. ARGV[OWN], ARGV[OWN + 1], tonumber(ARGV[OWN + 2])
local node, ttl = ARGV[OWN + 3], tonumber(ARGV[OWN + 4])
require_rights({{'HMGET', key, 'f'}, {'HSET', key, 'f', 'v'}})
local held = call('HMGET', key, 'session', 'until', 'ttl', 'heard', 'node')
local owner = held[1] or ''
local left = tonumber(held[2] or '0') - now
-- A node has one session at a time, so another of its sessions has ended. A time further ahead was set
-- by a clock that ran fast.
if owner ~= '' and owner ~= session and held[5] ~= node and left > 0 and left <= tonumber(held[3] or '0') then
  return {0, 0, left, held[5] or ''}
end
local unheard = held[4] and math.max(0, now - tonumber(held[4])) or 0
if owner ~= session then
  call('HSET', key, 'session', session, 'node', node, 'seq', '0')
end
call('HSET', key, 'until', text(now + ttl), 'ttl', text(ttl))
if silent then call('HSET', key, 'heard', text(now - silent)) end
return {1, (owner ~= '' and owner ~= session) and 1 or 0, unheard, node}
