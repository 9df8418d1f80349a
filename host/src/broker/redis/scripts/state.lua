#!lua flags=no-writes,allow-oom
-- Returns statistics for operators: {lag, dead letters, events that wait for a retry, ms that ids run
-- ahead, whether the ids of entries are times, entries that no reader needs and that are not trimmed,
-- `meta` as {field, value, ...}}.
local entry = entry_of(position())
-- Entries of a source that is not trimmed, and that no consumer group needs.
local unneeded = 0
if ARGV[13] ~= '1' then
  local length, groups = pcall('XLEN', S), pcall('XINFO', 'GROUPS', S)
  if type(length) == 'number' and not groups.err then
    local needed = backlog()
    for _, group in ipairs(groups) do
      local of = {}
      for i = 1, #group, 2 do of[group[i]] = group[i + 1] end
      -- An unknown lag: the group may need all.
      if of['name'] ~= P then needed = math.max(needed, of['lag'] and of['lag'] + of['pending'] or length) end
    end
    unneeded = math.max(0, length - needed)
  end
end
local ahead = math.max(0, number('last') / 4096 + 1704067200000 - now)
return {
  backlog(), call('XLEN', T .. 'dead'), call('XLEN', RETRYING), text(math.floor(ahead)),
  (entry == '0-0' or is_time(entry)) and 1 or 0, unneeded, call('HGETALL', META),
}
