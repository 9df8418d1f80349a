#!lua flags=allow-oom
-- Changes a user's attributes or memberships, at a cost that does not depend on their number.
-- Independent of partitions: the caller passes the last id of each.
-- KEYS: 1 the user's hash.
-- ARGV: max_age, ms; 'join', 'leave' or 'attributes'; group or JSON; the most memberships, and the
-- most that ended; then per partition: number, last id.
-- A membership is `number:joined ...`, and after leaving `number:joined-left ... @ms` with the time
-- of leaving.
-- Returns 'ok', or the counter that is at its limit, 'joined' or 'left': then nothing has changed.
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local key, max_age, what, most = KEYS[1], tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[4])
require_rights({
  {'HGET', key, 'f'}, {'HMGET', key, 'f'}, {'HGETALL', key}, {'HEXISTS', key, 'f'},
  {'HSET', key, 'f', 'v'}, {'HDEL', key, 'f'}, {'PERSIST', key}, {'PEXPIRE', key, '1'},
})

local function text(x) return string.format('%.0f', x) end

local joined, left, pruned = unpack(redis.call('HMGET', key, 'joined', 'left', 'pruned'))
joined, left, pruned = tonumber(joined or '0'), tonumber(left or '0'), tonumber(pruned or '0')

-- A membership that ended before the oldest kept notification has no effect any more. All are read,
-- so at most once in a hundredth of the time that they are kept; a time in the future was set by a
-- clock that ran fast.
if left > 0 and (now - pruned >= max_age / 100 or pruned > now) then
  joined, left, pruned = 0, 0, now
  local all = redis.call('HGETALL', key)
  for i = 1, #all, 2 do
    if string.sub(all[i], 1, 2) == 'g:' then
      local left_at = string.match(all[i + 1], '@(%d+)$')
      if not left_at then joined = joined + 1
      elseif tonumber(left_at) < now - max_age then redis.call('HDEL', key, all[i])
      else left = left + 1 end
    end
  end
end

local field = 'g:' .. ARGV[3]
local have = what ~= 'attributes' and redis.call('HGET', key, field)
local is_member = have and not string.find(have, '@', 1, true)
local refused = false
local spans = {}
if what == 'attributes' then
  if ARGV[3] == '{}' then redis.call('HDEL', key, 'attributes') else redis.call('HSET', key, 'attributes', ARGV[3]) end
elseif what == 'join' and not is_member then
  refused = joined >= most and 'joined' or not have and left >= most and 'left'
  if not refused then
    for i = 5, #ARGV, 2 do spans[#spans + 1] = ARGV[i] .. ':' .. ARGV[i + 1] end
    redis.call('HSET', key, field, table.concat(spans, ' '))
    joined = joined + 1
    if have then left = left - 1 end
  end
elseif what == 'leave' and is_member then
  local from = {}
  for number, id in string.gmatch(have, '(%d+):(%d+)') do from[number] = id end
  for i = 5, #ARGV, 2 do
    -- A partition that was added after the user joined counts from its beginning.
    spans[#spans + 1] = ARGV[i] .. ':' .. (from[ARGV[i]] or '0') .. '-' .. ARGV[i + 1]
  end
  spans[#spans + 1] = '@' .. text(now)
  redis.call('HSET', key, field, table.concat(spans, ' '))
  joined, left = joined - 1, left + 1
  if left == 1 then pruned = now end
end

if joined > 0 or left > 0 then
  redis.call('HSET', key, 'joined', text(joined), 'left', text(left), 'pruned', text(pruned))
else
  redis.call('HDEL', key, 'joined', 'left', 'pruned')
end
-- If only ended memberships remain, the key expires.
if joined > 0 or redis.call('HEXISTS', key, 'attributes') == 1 then redis.call('PERSIST', key)
else redis.call('PEXPIRE', key, ARGV[1]) end
return refused or 'ok'
