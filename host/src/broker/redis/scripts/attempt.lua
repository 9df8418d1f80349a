#!lua flags=allow-oom
-- Counts how often the same thing was said in a row: that an owner begins at a position, or that an entry is about to be tried.
-- ARGV  field of `meta`; what is said, or '' for the position.   Answers the count, then what heal() did.
life()
local field, what = ARGV[OWN], ARGV[OWN + 1]
local lost, strays = 0, 0
if what == '' then
  lost, strays = heal()
  what = position()
end
local before_this, times = string.match(meta(field) or '', '^(%S+) (%d+)$')
times = before_this == what and tonumber(times) + 1 or 1
call('HSET', META, field, what .. ' ' .. times)
return {times, lost, strays}
