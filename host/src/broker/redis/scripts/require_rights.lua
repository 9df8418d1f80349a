-- Inserted into every script that writes more than once. Lua has no rollback, and a command without
-- the right to it fails where it is called, so a script checks its rights before its first write.
local function require_rights(commands)
  for _, words in ipairs(commands) do
    if not redis.acl_check_cmd(unpack(words)) then
      error({err = 'NOPERM the user may not run ' .. table.concat(words, ' ')})
    end
  end
end
