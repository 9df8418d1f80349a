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
  local added = append_entry(at + 2, at + 1 + n)
  -- Raises the error as it is.
  if type(added) == 'table' then return added end
  ids[i] = added
  at = at + 1 + n
end
return ids
