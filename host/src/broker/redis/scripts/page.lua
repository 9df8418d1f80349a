#!lua flags=no-writes,allow-oom
-- A stretch of a log, and the floor as of the same moment: read at another one, a log that expires between the two would end in silence.
-- ARGV  log, id to begin above, most entries.   Answers {floor, whether the log is present, {'id pred', ...}}, one more than asked for if there is more.
local log, above, most = ARGV[OWN], ARGV[OWN + 1], tonumber(ARGV[OWN + 2])
replid()
local key = T .. 'l:' .. log
-- Ids whose records have expired would each be a hole of its own; the first one above them points to the last of them.
local too_old = expired()
local members = pcall('ZRANGEBYSCORE', key, tonumber(above) < too_old and text(too_old) or '(' .. above, '+inf', 'LIMIT', 0, most + 1)
-- A key of a foreign type is no log.
if members.err then return {text(floor()), 0, {}} end
local newest = call('ZREVRANGE', key, 0, 0)[1]
-- A log of which all that is asked for is too old is as good as gone.
local is_present = newest and (#members > 0 or tonumber(string.match(newest, '^%d+')) <= tonumber(above))
return {text(floor()), is_present and 1 or 0, members}
