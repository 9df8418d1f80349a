#!lua flags=no-writes,allow-oom
-- Returns the state of the partition, or {'begin'} if an epoch has to begin first. begin.lua does
-- that: scripts that may write are rejected while Redis cannot write, and clients must still be
-- able to read history then.
-- ARGV: '1' to return the state of the epoch before instead, which holds until something is written.
-- Returns {epoch, last, pending or '', position, floor, origin, now, epoch, its last valid id,
-- epoch, its last valid id, ...}.
local known, name, last, pending, origin = unpack(call('HMGET', META, 'replid', 'epoch', 'last', 'pending', 'origin'))
if not name or replid() ~= known and ARGV[OWN] ~= '1' then return {'begin'} end
local answer = {name, last or '0', pending or '', position(), text(floor()), origin, text(now)}
for _, run in ipairs(call('LRANGE', T .. 'epochs', 0, -1)) do
  local names, last_valid = string.match(run, '^(%S+) (%S+)$')
  for one in string.gmatch(names, '..') do
    answer[#answer + 1] = one
    answer[#answer + 1] = last_valid
  end
end
return answer
