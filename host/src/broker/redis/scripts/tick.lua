#!lua flags=allow-oom
-- Says to every node which id was the last, after all notices up to it.   Answers what heal() did.
local name = life()
local lost, strays = heal()
trim()
-- Once a minute the floor is kept, so that a clock that is set back does not lower it.
if is_due('floor_at', 60000) then call('HSET', META, 'floor0', text(floor()), 'floor_at', text(now + 60000)) end
call('PUBLISH', C .. 'tick', name .. ' ' .. (meta('last') or '0'))
return {lost, strays}
