#!lua flags=allow-oom
-- Changes a user's attributes or memberships. Independent of partitions: the caller passes the last
-- id of each.
-- KEYS: 1 the user's hash.
-- ARGV: max_age, ms; 'join', 'leave' or 'attributes'; group or JSON; then per partition: number,
-- last id.
-- A membership is `number:joined ...`, and after leaving `number:joined-left ... @ms` with the time
-- of leaving.
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local key, what = KEYS[1], ARGV[2]
require_rights({
  {'HGET', key, 'f'}, {'HGETALL', key}, {'HSET', key, 'f', 'v'}, {'HDEL', key, 'f'},
  {'PERSIST', key}, {'PEXPIRE', key, '1'},
})

if what == 'attributes' then
  if ARGV[3] == '{}' then redis.call('HDEL', key, 'attributes') else redis.call('HSET', key, 'attributes', ARGV[3]) end
else
  local field = 'g:' .. ARGV[3]
  local have = redis.call('HGET', key, field)
  local is_member = have and not string.find(have, '@', 1, true)
  if what == 'join' and not is_member then
    local spans = {}
    for i = 4, #ARGV, 2 do spans[#spans + 1] = ARGV[i] .. ':' .. ARGV[i + 1] end
    redis.call('HSET', key, field, table.concat(spans, ' '))
  elseif what == 'leave' and is_member then
    local joined = {}
    for number, id in string.gmatch(have, '(%d+):(%d+)') do joined[number] = id end
    local spans = {}
    for i = 4, #ARGV, 2 do
      -- A partition that was added after the user joined counts from its beginning.
      spans[#spans + 1] = ARGV[i] .. ':' .. (joined[ARGV[i]] or '0') .. '-' .. ARGV[i + 1]
    end
    spans[#spans + 1] = '@' .. string.format('%.0f', now)
    redis.call('HSET', key, field, table.concat(spans, ' '))
  end
end

-- A membership that ended before the oldest kept notification has no effect any more. If only ended
-- memberships remain, the key expires.
local is_known = false
local all = redis.call('HGETALL', key)
for i = 1, #all, 2 do
  local left = string.sub(all[i], 1, 2) == 'g:' and string.match(all[i + 1], '@(%d+)$')
  if not left then is_known = true
  elseif tonumber(left) < now - tonumber(ARGV[1]) then redis.call('HDEL', key, all[i]) end
end
if is_known then redis.call('PERSIST', key) else redis.call('PEXPIRE', key, ARGV[1]) end
return 'ok'
