#!lua flags=allow-oom
-- Removes a dead letter, also of an event that waits for a retry.
-- ARGV: id of the dead letter.
-- Returns 1, or 0 if it does not exist.
local id = ARGV[OWN]
require_rights({{'XDEL', T .. 'dead', '0-1'}, {'XDEL', RETRYING, '0-1'}, {'ZREM', DUE, 'v'}})
require_retry_types()
if call('XDEL', T .. 'dead', id) == 1 then return 1 end
call('ZREM', DUE, id)
return call('XDEL', RETRYING, id)
