#!lua
-- Appends the messages that a bridge received, if its listener still holds the lease. Without
-- allow-oom: a full Redis accepts no new entries.
-- ARGV: bridge; session; number of the first entry in the session; number of entries; per entry:
-- number of field names and values together, field names and values.
-- Returns {'done', 0}, {'lost', 0} or {'full', backlog}.
local key, session = T .. 'bridge:' .. ARGV[OWN], ARGV[OWN + 1]
local first, n = tonumber(ARGV[OWN + 2]), tonumber(ARGV[OWN + 3])
require_rights({{'XADD', S, '*', 'f', 'v'}, {'HMGET', key, 'f'}, {'HSET', key, 'f', 'v'}})
local held = call('HMGET', key, 'session', 'seq')
if held[1] ~= session then return {'lost', 0} end
-- An earlier attempt at this call, whose answer was lost, appended this many.
local done = tonumber(held[2])
if done >= first + n - 1 then return {'done', 0} end
local waiting = backlog()
if waiting >= tonumber(ARGV[12]) then return {'full', waiting} end
local at = OWN + 4
for i = first, first + n - 1 do
  local to = at + tonumber(ARGV[at])
  if i > done then
    local added = append_entry(at + 1, to)
    if type(added) == 'table' then
      call('HSET', key, 'seq', text(i - 1))
      return added
    end
  end
  at = to + 1
end
call('HSET', key, 'seq', text(first + n - 1))
return {'done', 0}
