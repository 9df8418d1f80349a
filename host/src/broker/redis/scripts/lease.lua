#!lua flags=allow-oom
-- Takes or renews the lease, unless the user lacks a right that a commit needs. The owner also
-- appends the events whose retry is due to the source again, in one step with the removal of their
-- dead letters. With allow-oom and without a check of the backlog: the memory is only moved, and
-- retries that waited for publishers to stop would starve.
-- ARGV: node; time to live, ms.
-- Returns 0, or the milliseconds for which another node still holds the lease.
require_commit_rights()
require_retry_rights()
require_retry_types()
local node, ttl = ARGV[OWN], ARGV[OWN + 1]
local key = T .. 'owner'
local owner = call('GET', key)
if owner and owner ~= node then return math.max(1, call('PTTL', key)) end
call('SET', key, node, 'PX', ttl)

-- As much as an append may write at once. What remains is due at the next renewal.
local MOST_BYTES = 1048576
local bytes = 0
local due = call('ZRANGEBYSCORE', DUE, '-inf', text(now), 'LIMIT', 0, 256)
-- No event waits for longer than the time that its retries have: a later time was set by a clock that
-- ran fast, and has come.
local furthest = now + number('retry_timeout')
for _, id in ipairs(call('ZRANGEBYSCORE', DUE, '(' .. text(furthest), '+inf', 'LIMIT', 0, 256)) do due[#due + 1] = id end
local letters = {}
for _, id in ipairs(due) do
  -- What another client added is removed: an error here would end every renewal.
  if string.match(id, '^%d+%-%d+$') then letters[#letters + 1] = id else call('ZREM', DUE, id) end
end
-- Events that failed together are due together, and keep their order.
table.sort(letters, before)
for _, id in ipairs(letters) do
  -- Fails for an id of more than 64 bits.
  local found = pcall('XRANGE', RETRYING, id, id)
  local values, of
  if found[1] then values, of = entry_of_letter(found[1][2]) end
  if values and #values > 0 and of['attempts'] and of['retries'] and of['first'] then
    for _, value in ipairs(values) do bytes = bytes + #value end
    -- First, because it fails if another client overwrote the source.
    local entry = call('XADD', S, '*', unpack(values))
    call('HSET', RETRIED, entry, of['attempts'] .. ' ' .. of['retries'] .. ' ' .. of['first'])
  end
  if found[1] then call('XDEL', RETRYING, id) end
  call('ZREM', DUE, id)
  if bytes > MOST_BYTES then break end
end
return 0
