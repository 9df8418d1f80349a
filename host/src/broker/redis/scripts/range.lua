#!lua flags=no-writes,allow-oom
-- Reads entries of a stream in order, and only the beginning of a large one. Redis has no command
-- that returns the size of an entry, so each is copied to be measured: one at a time, because
-- clients may add entries of up to 1 GiB.
-- KEYS: 1 the stream.
-- ARGV: id to start after; maximum number of entries; limits of an entry that is returned as a whole:
-- bytes of names and values, fields; bytes of the beginning of a larger one; bytes to examine before
-- the call ends.
-- Returns {id, fields} of each entry, or {id, first fields, bytes, number of fields} of a large one.
local after, count, examine = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[6])
local most_bytes, most_fields, room_of_excerpt = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local answer, examined = {}, 0
-- No id follows the largest one, and Redis rejects such a range.
local last_id = '18446744073709551615-18446744073709551615'
while #answer < count and examined < examine and after ~= last_id do
  local entry = redis.call('XRANGE', KEYS[1], '(' .. after, '+', 'COUNT', 1)[1]
  if not entry then break end
  local fields, bytes = entry[2], 0
  after = entry[1]
  for i = 1, #fields do bytes = bytes + #fields[i] end
  examined = examined + bytes
  if bytes <= most_bytes and #fields <= 2 * most_fields then
    answer[#answer + 1] = {after, fields}
  else
    local first, room = {}, room_of_excerpt
    -- Empty fields take no room, so their number is bounded as well.
    for i = 1, math.min(#fields, 2 * math.floor(room_of_excerpt / 16)) do
      first[i] = string.sub(fields[i], 1, room)
      room = room - #first[i]
    end
    answer[#answer + 1] = {after, first, bytes, #fields / 2}
    entry, fields = nil, nil
    -- Otherwise the copy could occupy memory for a long time.
    if bytes > 1048576 then collectgarbage() end
  end
end
return answer
