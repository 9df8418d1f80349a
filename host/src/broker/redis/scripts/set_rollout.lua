#!lua flags=allow-oom
-- Writes a roll-out or removes it.
-- KEYS: 1 the hash of roll-outs.
-- ARGV: plugin; the roll-out, or '' to remove it; the roll-out that it replaces, or '' for any.
-- Returns the revision of this write; nil if the present roll-out is another one.
local rollouts, plugin, rollout, replaced = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
require_rights({{'HGET', rollouts, 'f'}, {'HSET', rollouts, 'f', 'v'}, {'HDEL', rollouts, 'f'}})
if replaced ~= '' and redis.call('HGET', rollouts, plugin) ~= replaced then return nil end
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local before = tonumber(redis.call('HGET', rollouts, '') or 0) or 0
-- At least the time, so that it also grows if the key was deleted. A number far ahead of the clock is
-- of another client; see rollouts.lua.
if not (before < now + 3600000) then before = 0 end
local revision = math.max(now, before + 1)
if rollout == '' then redis.call('HDEL', rollouts, plugin) else redis.call('HSET', rollouts, plugin, rollout) end
redis.call('HSET', rollouts, '', string.format('%.0f', revision))
return revision
