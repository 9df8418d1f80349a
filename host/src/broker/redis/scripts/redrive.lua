#!lua
-- Appends the fields of a dead letter to the source again and removes it. Without allow-oom: a full Redis takes no more.
-- ARGV  id of the dead letter.   Answers 1, or 0 if it is not there.
local found = call('XRANGE', T .. 'dead', ARGV[OWN], ARGV[OWN])
if not found[1] then return 0 end
local values = {}
for i = 1, #found[1][2], 2 do
  local field = found[1][2][i]
  if string.sub(field, 1, 2) == 'f:' then
    values[#values + 1] = string.sub(field, 3)
    values[#values + 1] = found[1][2][i + 1]
  end
end
if #values == 0 then return redis.error_reply('ERR the entry was gone when it was dead-lettered, so it cannot be redriven: drop it') end
call('XADD', S, '*', unpack(values))
call('XDEL', T .. 'dead', ARGV[OWN])
return 1
