#!lua flags=allow-oom
-- Moves a device cursor or the read marker of a user if it still equals the value that the caller
-- read. Independent of partitions.
-- KEYS: 1 the user's device cursors.
-- ARGV: lifetime of a device cursor, ms; lifetime of the read marker, ms; maximum number of devices
-- of one kind (acknowledged or not); field; expected value ('' for none); new value.
-- Returns 1 if the cursor was moved.
-- A value is `ms a cursor` if it was acknowledged, `ms b cursor` if a stream began there; `ms` is
-- the time of its last move.
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local key, field = KEYS[1], ARGV[4]
require_rights({{'HGETALL', key}, {'HDEL', key, 'f'}, {'HSET', key, 'f', 'v'}, {'PEXPIRE', key, '1'}})
local age = { device = tonumber(ARGV[1]), read = tonumber(ARGV[2]) }

local is, gone, others = '', {}, {}
local all = redis.call('HGETALL', key)
for i = 1, #all, 2 do
  local name, ms, what = all[i], string.match(all[i + 1], '^(%d+) (.*)$')
  ms = tonumber(ms)
  if not ms or ms < now - (age[name] or age.device) then
    gone[#gone + 1] = name
  elseif name == field then
    is = what
  elseif name ~= 'read' and string.sub(what, 1, 1) == string.sub(ARGV[6], 1, 1) then
    others[#others + 1] = { ms = ms, name = name }
  end
end
if is ~= ARGV[5] then return 0 end

if field ~= 'read' then
  table.sort(others, function(a, b) return a.ms > b.ms or (a.ms == b.ms and a.name > b.name) end)
  for i = tonumber(ARGV[3]), #others do gone[#gone + 1] = others[i].name end
end
for _, name in ipairs(gone) do redis.call('HDEL', key, name) end
redis.call('HSET', key, field, string.format('%.0f', now) .. ' ' .. ARGV[6])
redis.call('PEXPIRE', key, string.format('%.0f', math.max(age.device, age.read)))
return 1
