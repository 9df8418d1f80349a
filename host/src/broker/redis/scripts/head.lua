#!lua flags=no-writes,allow-oom
-- Where the partition is. Answers {'begin'} if a life has to begin first, which begin.lua does: a script that may write is refused when
-- Redis cannot, and then clients must still be able to read history.
-- Answers {life, last, pending or '', position, floor, origin, now, life, last that survived, life, last that survived, ...}.
local known, name, last, pending, origin = unpack(call('HMGET', META, 'replid', 'life', 'last', 'pending', 'origin'))
if replid() ~= known then return {'begin'} end
local answer = {name, last or '0', pending or '', position(), text(floor()), origin, text(now)}
for _, one in ipairs(call('LRANGE', T .. 'lives', 0, -1)) do
  local of, survived = string.match(one, '^(%S+) (%S+)$')
  answer[#answer + 1] = of
  answer[#answer + 1] = survived
end
return answer
