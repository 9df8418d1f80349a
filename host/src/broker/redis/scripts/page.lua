#!lua flags=no-writes,allow-oom
-- Returns a range of a log and the floor of the same moment. If the floor were read separately, a
-- log that expires in between would appear to end without a gap.
-- ARGV: log; id to start above; maximum number of entries.
-- Returns {floor, whether the log exists, {'id predecessor', ...}}, with one entry beyond the
-- maximum if there are more.
local log, above, most = ARGV[OWN], ARGV[OWN + 1], tonumber(ARGV[OWN + 2])
replid()
local key = T .. 'l:' .. log
-- Skip ids whose records have expired: each would be a gap of its own. The first id above them has
-- the last of them as its predecessor.
local too_old = expired()
local members = pcall('ZRANGEBYSCORE', key, tonumber(above) < too_old and text(too_old) or '(' .. above, '+inf', 'LIMIT', 0, most + 1)
-- A key of the wrong type is treated as an absent log.
if members.err then return {text(floor()), 0, {}} end
local newest = call('ZREVRANGE', key, 0, 0)[1]
-- If all requested entries of a log are too old, the log counts as absent.
local is_present = newest and (#members > 0 or tonumber(string.match(newest, '^%d+')) <= tonumber(above))
return {text(floor()), is_present and 1 or 0, members}
