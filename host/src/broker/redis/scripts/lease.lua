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
-- Events that failed together are due together, and keep their order.
table.sort(due, before)
for _, id in ipairs(due) do
  local found = call('XRANGE', RETRYING, id, id)[1]
  if found then
    local values, of = entry_of_letter(found[2])
    for _, value in ipairs(values) do bytes = bytes + #value end
    -- First, because it fails if another client overwrote the source.
    local entry = call('XADD', S, '*', unpack(values))
    call('HSET', RETRIED, entry, of['attempts'] .. ' ' .. of['retries'] .. ' ' .. of['first'])
    call('XDEL', RETRYING, id)
  end
  call('ZREM', DUE, id)
  if bytes > MOST_BYTES then break end
end
return 0
