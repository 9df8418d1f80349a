#!lua flags=no-writes,allow-oom
-- Checks which of the required commands the current user may not run.
-- ARGV: commands, one word per line.
-- Returns the commands that are not permitted.
local denied = {}
for i = 1, #ARGV do
  local words = {}
  for word in string.gmatch(ARGV[i], '[^\n]+') do words[#words + 1] = word end
  if not redis.acl_check_cmd(unpack(words)) then denied[#denied + 1] = ARGV[i] end
end
return denied
