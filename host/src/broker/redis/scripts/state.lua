#!lua flags=no-writes,allow-oom
-- Returns statistics for operators: {lag, dead letters, events that wait for a retry, ms that ids run
-- ahead, whether the ids of entries are times, `meta` as {field, value, ...}}.
local entry = entry_of(position())
local ahead = math.max(0, number('last') / 4096 + 1704067200000 - now)
return {
  backlog(), call('XLEN', T .. 'dead'), call('XLEN', RETRYING), text(math.floor(ahead)),
  (entry == '0-0' or is_time(entry)) and 1 or 0, call('HGETALL', META),
}
