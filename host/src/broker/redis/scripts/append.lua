#!lua
-- Appends entries to the source. Without allow-oom: a full Redis accepts no new entries.
-- ARGV: '1' to check the backlog first; number of entries; per entry: number of field names and
-- values together, field names and values.
-- Returns {'full', backlog} or the ids.
local at = OWN + 1
require_rights({{'XADD', S, '*', 'f', 'v'}})
if ARGV[OWN] == '1' then
  local waiting = backlog()
  if waiting >= tonumber(ARGV[12]) then return {'full', text(waiting)} end
end
local ids = {}
for i = 1, tonumber(ARGV[OWN + 1]) do
  local n = tonumber(ARGV[at + 1])
  local added = pcall('XADD', S, '*', unpack(ARGV, at + 2, at + 1 + n))
  if type(added) == 'table' and i == 1 and string.find(added.err, 'exhausted', 1, true) then
    call('HDEL', META, 'probe_at')
    heal()
    added = call('XADD', S, '*', unpack(ARGV, at + 2, at + 1 + n))
  end
  -- Raises any other error as it is.
  if type(added) == 'table' then return added end
  ids[i] = added
  at = at + 1 + n
end
return ids
