#!lua flags=allow-oom
-- Publishes the last id to every node, after all notices up to it.
-- Returns the results of heal() and the time, ms.
require_rights({{'PUBLISH', C .. 'tick', 'v'}})
local name = epoch()
local trimmed_unread, foreign_entries = heal()
trim()
-- Store the floor once a minute, so that a clock that is set back does not lower it.
if is_due('floor_at', 60000) then call('HSET', META, 'floor0', text(floor()), 'floor_at', text(now + 60000)) end
call('PUBLISH', C .. 'tick', name .. ' ' .. (meta('last') or '0'))
return {trimmed_unread, foreign_entries, now}
