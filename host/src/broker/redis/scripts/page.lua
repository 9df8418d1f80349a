#!lua flags=no-writes,allow-oom
-- A stretch of a log, and the floor as of the same moment: read at another one, a log that expires between the two would end in silence.
-- ARGV  log, id to begin above, most entries.   Answers {floor, whether the log exists, {'id pred', ...}}, one more than asked for if there is more.
local log, above, most = ARGV[OWN], ARGV[OWN + 1], tonumber(ARGV[OWN + 2])
replid()
local key = T .. 'l:' .. log
local members = pcall('ZRANGEBYSCORE', key, '(' .. above, '+inf', 'LIMIT', 0, most + 1)
-- A key of a foreign type is no log.
if members.err then return {text(floor()), 0, {}} end
return {text(floor()), call('EXISTS', key), members}
