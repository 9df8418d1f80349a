#!lua flags=no-writes,allow-oom
-- Returns statistics for operators: {lag, dead letters, ms that ids run ahead, `meta` as {field,
-- value, ...}}.
local ahead = math.max(0, number('last') / 4096 + 1704067200000 - now)
return {backlog(), call('XLEN', T .. 'dead'), text(math.floor(ahead)), call('HGETALL', META)}
