#!lua flags=allow-oom
-- Releases the lease of the listener of a bridge if this session holds it.
-- ARGV: bridge; session; ms since its subscription last worked, '' without one.
local key, session, silent = T .. 'bridge:' .. ARGV[OWN], ARGV[OWN + 1], tonumber(ARGV[OWN + 2])
require_rights({{'HGET', key, 'f'}, {'HSET', key, 'f', 'v'}})
if call('HGET', key, 'session') == session then
  if silent then call('HSET', key, 'heard', text(now - silent)) end
  call('HSET', key, 'session', '', 'until', '0')
end
return 'ok'
