#!lua flags=no-writes,allow-oom
-- Reads the roll-outs of some plugins.
-- KEYS: 1 the hash of roll-outs.
-- ARGV: the largest roll-out, in bytes; the plugins.
-- Returns {revision, {{plugin, roll-out}, ...}}; the roll-out is nil if the value is none.
require_rights({{'HSTRLEN', KEYS[1], 'f'}, {'HGET', KEYS[1], 'f'}})
local found = {}
for i = 2, #ARGV do
  local n_bytes = redis.call('HSTRLEN', KEYS[1], ARGV[i])
  -- A value that another client has written is not transferred, however large it is.
  if n_bytes > tonumber(ARGV[1]) then found[#found + 1] = {ARGV[i], false}
  elseif n_bytes > 0 then found[#found + 1] = {ARGV[i], redis.call('HGET', KEYS[1], ARGV[i])} end
end
-- No plugin has the empty name.
local is_short = redis.call('HSTRLEN', KEYS[1], '') <= 16
local revision = is_short and string.match(redis.call('HGET', KEYS[1], '') or '', '^%d+$')
revision = tonumber(revision or 0)
-- As set_rollout.lua: otherwise nodes would report that they have followed all later writes.
local clock = redis.call('TIME')
if revision >= clock[1] * 1000 + 3600000 then revision = 0 end
return {revision, found}
