#!lua flags=allow-oom
-- Writes a roll-out or removes it.
-- KEYS: 1 the hash of roll-outs.
-- ARGV: plugin; the roll-out, or '' to remove it.
-- Returns the revision of this write.
local rollouts, plugin, rollout = KEYS[1], ARGV[1], ARGV[2]
require_rights({{'HGET', rollouts, 'f'}, {'HSET', rollouts, 'f', 'v'}, {'HDEL', rollouts, 'f'}})
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local before = tonumber(redis.call('HGET', rollouts, '') or 0) or 0
-- At least the time, so that it also grows if the key was deleted. Ignores what is not a revision.
if not (before < 2 ^ 52) then before = 0 end
local revision = math.max(now, before + 1)
if rollout == '' then redis.call('HDEL', rollouts, plugin) else redis.call('HSET', rollouts, plugin, rollout) end
redis.call('HSET', rollouts, '', string.format('%.0f', revision))
return revision
