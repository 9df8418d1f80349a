#!lua flags=allow-oom
-- Assigns a partition number to a source permanently: cursors identify partitions by number, so a
-- number is never reused.
-- KEYS: 1 the hash of all numbers.
-- ARGV: source; the number in its `meta`, or ''; the maximum number of partitions.
-- Returns the number, -1 if none is left, or the name of another source that has the number.
local source, claimed, most = ARGV[1], ARGV[2], tonumber(ARGV[3])
local have = redis.call('HGET', KEYS[1], source)
if have then return tonumber(have) end
local highest = -1
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  -- Only when the hash was lost: it is rebuilt from the numbers stored in the partitions.
  if all[i + 1] == claimed then return all[i] end
  highest = math.max(highest, tonumber(all[i + 1]))
end
local mine = claimed ~= '' and tonumber(claimed) or highest + 1
if mine >= most then return -1 end
redis.call('HSET', KEYS[1], source, mine)
return mine
