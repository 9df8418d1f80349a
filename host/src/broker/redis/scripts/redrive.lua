#!lua
-- Appends the fields of a dead letter to the source again and removes the dead letter, also of an
-- event that waits for a retry. Without allow-oom: a full Redis accepts no new entries.
-- ARGV: id of the dead letter.
-- Returns 1, or 0 if it does not exist.
local id = ARGV[OWN]
require_rights({
  {'XADD', S, '*', 'f', 'v'}, {'XDEL', T .. 'dead', '0-1'}, {'XDEL', RETRYING, '0-1'}, {'ZREM', DUE, 'v'},
})
require_retry_types()
local key = T .. 'dead'
local found = call('XRANGE', key, id, id)[1]
if not found then
  key = RETRYING
  found = call('XRANGE', key, id, id)[1]
end
if not found then return 0 end
local values, of = entry_of_letter(found[2])
if of['entry_bytes'] then return redis.error_reply('ERR the dead letter holds only the beginning of its entry; publish the event in smaller parts, then drop the dead letter') end
if #values == 0 then return redis.error_reply('ERR the entry no longer existed when it was dead-lettered and cannot be redriven; drop it') end
call('XADD', S, '*', unpack(values))
call('XDEL', key, id)
if key == RETRYING then call('ZREM', DUE, id) end
return 1
