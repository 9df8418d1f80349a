#!lua flags=allow-oom
-- Gives a source the number of its partition, once and for good: a cursor names partitions by it, so no number is given out twice.
-- KEYS  1 the hash of all numbers.   ARGV  source; the number in its `meta`, or ''; how many numbers there are.
-- Answers the number, or -1 if none is left, or the name of another source that has it.
local source, claimed, most = ARGV[1], ARGV[2], tonumber(ARGV[3])
local have = redis.call('HGET', KEYS[1], source)
if have then return tonumber(have) end
local highest = -1
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  -- The hash was lost and is made again from what the partitions themselves remember.
  if all[i + 1] == claimed then return all[i] end
  highest = math.max(highest, tonumber(all[i + 1]))
end
local mine = claimed ~= '' and tonumber(claimed) or highest + 1
if mine >= most then return -1 end
redis.call('HSET', KEYS[1], source, mine)
return mine
