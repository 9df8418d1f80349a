#!lua flags=allow-oom
-- Counts consecutive repetitions of the same event: an owner that starts at a position, or an
-- attempt to process an entry.
-- ARGV: field of `meta`; the subject to count, or '' for the position.
-- Returns the count and the results of heal().
epoch()
local field, what = ARGV[OWN], ARGV[OWN + 1]
local trimmed_unread, foreign_entries = 0, 0
if what == '' then
  trimmed_unread, foreign_entries = heal()
  what = position()
end
local before_this, times = string.match(meta(field) or '', '^(%S+) (%d+)$')
times = before_this == what and tonumber(times) + 1 or 1
call('HSET', META, field, what .. ' ' .. times)
return {times, trimmed_unread, foreign_entries}
