#!lua flags=no-writes,allow-oom
-- Which of the commands that we need this user may not run.   ARGV  commands, a word a line.
-- Answers those that are refused.
local refused = {}
for i = 1, #ARGV do
  local words = {}
  for word in string.gmatch(ARGV[i], '[^\n]+') do words[#words + 1] = word end
  if not redis.acl_check_cmd(unpack(words)) then refused[#refused + 1] = ARGV[i] end
end
return refused
