#!lua flags=allow-oom
-- Creates the partition if it is new, begins an epoch if this primary is new to it, and applies a
-- changed max_age. Raising the age must not lower the floor, because expired entries do not return.
-- Returns the results of heal().
epoch()
local old, new = number('max_age'), tonumber(ARGV[4])
if old ~= new then
  call('HSET', META, 'floor0', text(floor()))
  if new > old then
    local age0, id0 = meta('age0'), number('id0')
    local oldest = old
    if age0 and id_of(now - tonumber(age0)) < id0 then oldest = math.min(old, tonumber(age0)) end
    call('HSET', META, 'age0', text(oldest), 'id0', text(math.max(id_of(now), number('last'), number('pending'))))
  end
  call('HSET', META, 'max_age', text(new))
end
return {heal()}
