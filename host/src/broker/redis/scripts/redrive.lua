#!lua
-- Appends the fields of a dead letter to the source again and removes the dead letter. Without
-- allow-oom: a full Redis accepts no new entries.
-- ARGV: id of the dead letter.
-- Returns 1, or 0 if it does not exist.
require_rights({{'XADD', S, '*', 'f', 'v'}, {'XDEL', T .. 'dead', '0-1'}})
local found = call('XRANGE', T .. 'dead', ARGV[OWN], ARGV[OWN])
if not found[1] then return 0 end
local values = {}
for i = 1, #found[1][2], 2 do
  local field = found[1][2][i]
  if field == 'entry_bytes' then return redis.error_reply('ERR the dead letter holds only the beginning of its entry; publish the event in smaller parts, then drop the dead letter') end
  if string.sub(field, 1, 2) == 'f:' then
    values[#values + 1] = string.sub(field, 3)
    values[#values + 1] = found[1][2][i + 1]
  end
end
if #values == 0 then return redis.error_reply('ERR the entry no longer existed when it was dead-lettered and cannot be redriven; drop it') end
call('XADD', S, '*', unpack(values))
call('XDEL', T .. 'dead', ARGV[OWN])
return 1
