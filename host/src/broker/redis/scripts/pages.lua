#!lua flags=no-writes,allow-oom
-- Returns a range of each of several logs and the floor of the same moment. If the floor were read
-- separately, a log that expires in between would appear to end without a gap.
-- ARGV: maximum number of entries of a log; then per log: its name, and the id to start above.
-- Returns {floor, {{whether the log exists, {'id predecessor', ...}}, ...}}, with one entry beyond
-- the maximum if a log has more.
local most = tonumber(ARGV[OWN])
replid()
local too_old = expired()
local pages = {}
for i = OWN + 1, #ARGV, 2 do
  local key, above = T .. 'l:' .. ARGV[i], ARGV[i + 1]
  local is_present, members = 0, {}
  -- Read first: most logs have nothing new and cost one command. A key of the wrong type is treated
  -- as an absent log.
  local newest = pcall('ZREVRANGE', key, 0, 0)
  if not newest.err and newest[1] then
    if tonumber(string.match(newest[1], '^%d+')) <= tonumber(above) then is_present = 1
    else
      -- Skip ids whose records have expired: each would be a gap of its own. The first id above
      -- them has the last of them as its predecessor. If all requested entries of a log are too
      -- old, the log counts as absent.
      members = call('ZRANGEBYSCORE', key, tonumber(above) < too_old and text(too_old) or '(' .. above, '+inf', 'LIMIT', 0, most + 1)
      if #members > 0 then is_present = 1 end
    end
  end
  pages[#pages + 1] = {is_present, members}
end
return {text(floor()), pages}
