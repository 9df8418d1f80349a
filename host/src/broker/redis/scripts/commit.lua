#!lua flags=allow-oom
-- Writes the outcomes of a batch, or one slice of a plan, if the partition is at position `prev` in
-- the given epoch. Lua scripts have no rollback, so the script first reads and decides everything
-- and then writes with commands that cannot fail.
--
-- ARGV:
-- - size up to which a record is sent with its notice, in bytes
-- - epoch; prev; slice (-1: a batch of whole plans); '1' for the final slice
-- - number of items, then per item: kind, entry, dedupe hash or '', decision, and
--     c (commit): number of notifications, then per notification: record ('' in a later slice if it
--       is not sent with notices), number of targets, targets
--     x (dead letter): reason, plugin, attempts, number of fields, fields
--     o (dead letter of a large entry): reason, plugin, attempts; '1' to copy the fields from the
--       source; bytes and number of fields of the entry; number of fields in its beginning, fields
--     r (retry): as x, preceded by the most retries and the most ms from the first attempt
--     d (discard), u (unrouted): nothing
--
-- Returns {'conflict'} or {'done', outcome, first id or '', outcome, first id or '', ...}.
local at = OWN - 1
local function take()
  at = at + 1
  return ARGV[at]
end

local inline = tonumber(take())
local wanted, prev, slice, is_final = take(), take(), tonumber(take()), take() == '1'
local name = epoch()
local pos = position()
local slices = tonumber(string.match(pos, '/(%d+)$') or '0')
if name ~= wanted or pos ~= prev or slices ~= math.max(slice, 0) then return {'conflict'} end
-- Only a plan that is being written in slices is already pending.
local is_continued = slice > 0

local items = {}
local is_retry = false
for i = 1, tonumber(take()) do
  local item = {kind = take(), entry = take(), hash = take(), decision = take()}
  if item.kind == 'c' then
    item.parts = {}
    for j = 1, tonumber(take()) do
      local part = {record = take(), n = tonumber(take())}
      part.first = at + 1
      at = at + part.n
      item.parts[j] = part
    end
  elseif item.kind == 'x' or item.kind == 'o' or item.kind == 'r' then
    if item.kind == 'r' then item.retries, item.timeout = tonumber(take()), tonumber(take()) end
    item.reason, item.plugin, item.attempts = take(), take(), take()
    if item.kind == 'o' then item.is_copied, item.n_bytes, item.n_fields = take() == '1', take(), take() end
    if item.kind == 'o' then item.kind = 'x' end
    item.fields = {}
    for j = 1, 2 * tonumber(take()) do item.fields[j] = take() end
  end
  items[i] = item
  is_retry = is_retry or item.kind == 'r'
end
if is_continued then
  if items[1].entry ~= entry_of(pos) then return {'conflict'} end
  -- Some logs already have the entry, so the plan can only be completed.
  if items[1].kind ~= 'c' then return redis.error_reply('ERR a plan that was started in slices can only be continued') end
end

for _, item in ipairs(items) do
  -- Few entries could follow such a position. The source is set right, and what follows is read again.
  if is_high(item.entry) then
    heal()
    return {'conflict'}
  end
end

-- Phase 1: decide. Everything that could fail in phase 2 is checked here: an event whose position
-- did not move is committed again, under another id.

local LOGS, NOTICES = T .. 'l:', C .. 'l:'
local may = redis.acl_check_cmd

require_commit_rights()
if is_retry then require_retry_rights() end
for _, item in ipairs(items) do
  for _, part in ipairs(item.parts or {}) do
    for j = part.first, part.first + part.n - 1 do
      local key, channel = LOGS .. ARGV[j], NOTICES .. ARGV[j]
      -- The loops over the targets are nearly all of the time of a large plan: tables only on failure.
      if not (may('ZADD', key, '1', 'v') and may('PUBLISH', channel, 'v')) then
        require_rights({{'ZADD', key, '1', 'v'}, {'PUBLISH', channel, 'v'}})
      end
    end
  end
end

local counters = {
  'b', 'last', 'n', 'committed', 'discarded', 'unrouted', 'duplicate', 'dead-lettered', 'retrying',
  'dead_trimmed', 'dedupe_overflows', 'wrong_type_logs',
}
for i, value in ipairs(call('HMGET', META, unpack(counters))) do
  if value and not string.match(value, '^%-?%d+$') then
    return redis.error_reply('ERR the field ' .. counters[i] .. ' of ' .. META .. ' is not a number; set it to one with HSET')
  end
end
if is_continued and not meta('pending') then
  return redis.error_reply('ERR ' .. META .. ' has no pending id within a plan; restore the partition')
end

require_type(T .. 'decisions', 'stream')
require_type(T .. 'dead', 'stream')
if is_retry then require_retry_types() end

-- The earlier attempts at entries that a retry appended.
local earlier = {}
if require_type(RETRIED, 'hash') then
  local entries = {}
  for i, item in ipairs(items) do entries[i] = item.entry end
  for i, found in ipairs(call('HMGET', RETRIED, unpack(entries))) do
    local attempts, retries, first = string.match(found or '', '^(%d+) (%d+) (%d+)$')
    if attempts then earlier[entries[i]] = {attempts = tonumber(attempts), retries = tonumber(retries), first = tonumber(first)} end
  end
end

local window = tonumber(ARGV[8])
local function bucket(entry) return math.floor(time_of(entry) / window) end

-- The newest id in a log, as text; false if the log is absent; 'foreign' if its key has the wrong
-- type.
local tops = {}
local function top(log)
  local newest = tops[log]
  if newest == nil then
    -- Numbers as text: Redis formats a number of Lua as a fraction, which takes longer than the rest
    -- of the call.
    local found = pcall('ZREVRANGE', LOGS .. log, '0', '0')
    if found.err then newest = 'foreign'
    elseif found[1] then newest = string.match(found[1], '^%d+')
    else newest = false end
    tops[log] = newest
  end
  return newest
end

local function foreign(key) return 'the key ' .. key .. ' has the wrong type; rename or delete it, then redrive' end

-- Which hashes of the batch are in which dedupe bucket, read with one call per bucket. Indexed by
-- bucket, then by hash; false if the key has the wrong type.
local seen = {}
if window > 0 and not is_continued then
  local lookups = {}
  for _, item in ipairs(items) do
    if item.kind ~= 'x' and item.hash ~= '' then
      local b = bucket(item.entry)
      for _, one in ipairs({b, b - 1}) do
        lookups[one] = lookups[one] or {}
        table.insert(lookups[one], item.hash)
      end
    end
  end
  for b, hashes in pairs(lookups) do
    local found = pcall('SMISMEMBER', T .. 'seen:' .. text(b), unpack(hashes))
    seen[b] = not found.err and {}
    for i, hash in ipairs(hashes) do
      if seen[b] and found[i] == 1 then seen[b][hash] = true end
    end
  end
end

-- Whether an event for which a plugin requested a retry gets one; otherwise it stays a dead letter.
local n_retrying = is_retry and call('XLEN', RETRYING) or 0
local function is_retried(item)
  local before = earlier[item.entry] or {retries = 0, first = now}
  local delay = 1000 * 2 ^ before.retries
  if before.retries >= item.retries or now + delay - before.first > item.timeout then return false end
  if #item.fields > MOST_ARGUMENTS then
    item.reason = item.reason .. '; it is not retried, because it has too many fields'
    return false
  end
  if n_retrying >= tonumber(ARGV[10]) then
    item.reason = item.reason .. '; it is not retried, because ' .. n_retrying .. ' events wait for a retry (retention.dead_letter_entries)'
    return false
  end
  n_retrying = n_retrying + 1
  item.due, item.retry_no, item.first = now + delay, before.retries + 1, before.first
  return true
end

local in_batch = {}
local is_letter = false
for _, item in ipairs(items) do
  local fate = item.kind
  if fate == 'r' then
    fate = is_retried(item) and 'r' or 'x'
  elseif fate ~= 'x' and not is_continued then
    if item.hash ~= '' and window > 0 then
      local b = bucket(item.entry)
      local was = in_batch[item.hash]
      for _, one in ipairs({b, b - 1}) do
        if not seen[one] then fate, item.reason = 'x', foreign(T .. 'seen:' .. text(one)) end
      end
      if fate ~= 'x' and (was and b - was <= 1 or seen[b][item.hash] or seen[b - 1][item.hash]) then fate = 'duplicate' end
    end
    if fate == 'c' then
      for _, part in ipairs(item.parts) do
        for j = part.first, part.first + part.n - 1 do
          if top(ARGV[j]) == 'foreign' then fate, item.reason = 'x', foreign(T .. 'l:' .. ARGV[j]) break end
        end
      end
    end
    if fate == 'x' then
      -- The proposal was not a dead letter, so the caller did not send the fields.
      local found = pcall('XRANGE', S, item.entry, item.entry)
      item.plugin, item.attempts, item.fields = '', '1', not found.err and found[1] and found[1][2] or {}
    elseif fate ~= 'duplicate' and item.hash ~= '' and window > 0 then
      in_batch[item.hash] = bucket(item.entry)
    end
  end
  if item.is_copied then
    local found = pcall('XRANGE', S, item.entry, item.entry)
    -- Trimmed in the meantime: the dead letter holds the beginning that the caller read.
    if not found.err and found[1] then item.fields, item.n_bytes = found[1][2], nil end
  end
  item.fate = fate
  is_letter = is_letter or fate == 'x' or fate == 'r'
  local before = earlier[item.entry]
  item.attempts = (before and before.attempts or 0) + tonumber(item.attempts or '1')
end

if is_letter then read_letter_ids() end

-- Phase 2: write. Trim first, so that a full Redis can drain.

trim()

local ttl = text(lifetime(meta('max_age')))
local too_old = '(' .. text(expired())
-- The ranks, from the newest entry, of those beyond the limit of a log.
local beyond, beyond_all = text(-ARGV[5] - 1), text(-ARGV[6] - 1)
-- The first write of a log in each hundredth of max_age renews its expiry, which is 2 % after the
-- age of an entry: at least 1 % is left for the newest. Also the first write after max_age was
-- raised, because the expiry that is set is that of the old age.
local period = math.max(1, math.floor(tonumber(meta('max_age')) * 4096 / 100))
local id0 = number('id0')
local last = number('last')
local low = floor()
local newest_bucket = number('b')
-- Set by a clock that ran fast, or by an id that is not a time: would leave no bucket to remember in.
if newest_bucket > math.floor(now / window) + 1 then
  call('UNLINK', T .. 'seen:' .. text(newest_bucket), T .. 'seen:' .. text(newest_bucket - 1))
  newest_bucket = math.floor(now / window)
  call('HSET', META, 'b', text(newest_bucket))
end
local marks = {}
local counts = {}
local function count(what) counts[what] = (counts[what] or 0) + 1 end

-- The newest bucket advances with the time of entries, not of the clock. Removes the buckets that
-- left the window, even if a quiet period skipped some.
local function roll(b)
  if b > newest_bucket then
    call('UNLINK', T .. 'seen:' .. text(newest_bucket - 1))
    if b > newest_bucket + 1 then call('UNLINK', T .. 'seen:' .. text(newest_bucket)) end
    newest_bucket = b
    call('HSET', META, 'b', text(b))
  end
end

local function remember(item)
  if window == 0 then return end
  local b = bucket(item.entry)
  roll(b)
  -- An entry older than the window (created under a slower clock) would create a bucket that is
  -- never removed.
  if item.hash == '' or b < newest_bucket - 1 then return end
  marks[b] = marks[b] or {}
  table.insert(marks[b], item.hash)
end

-- Writes the hashes that remember() collected, with one call per bucket, up to the limit of a
-- bucket.
local function write_marks()
  for b, hashes in pairs(marks) do
    -- A later item of the same batch may have moved the window past this bucket.
    if b >= newest_bucket - 1 then
      local key = T .. 'seen:' .. text(b)
      local room = math.max(0, tonumber(ARGV[9]) - call('SCARD', key))
      if room < #hashes then counts['dedupe_overflows'] = (counts['dedupe_overflows'] or 0) + #hashes - room end
      if room > 0 then call('SADD', key, unpack(hashes, 1, math.min(room, #hashes))) end
    end
  end
end

-- Adds the id of a notification to the log of each target and publishes the notices.
local function index(part, id)
  local notice = name .. ' ' .. id
  if part.record ~= '' and #part.record <= inline then notice = notice .. ' ' .. part.record end
  local floor_or_last = text(math.min(low, last))
  local period_begin = math.max(id0 + 1, tonumber(id) - tonumber(id) % period)
  for j = part.first, part.first + part.n - 1 do
    local log = ARGV[j]
    local newest = top(log)
    if newest == 'foreign' then
      -- Found in a later slice: the plan can no longer be undone.
      count('wrong_type_logs')
    else
      local key = LOGS .. log
      call('ZADD', key, id, id .. ' ' .. (newest or floor_or_last))
      -- The remaining entries point to the removed ones as predecessors. The key's own expiry takes
      -- effect only for a log that is no longer written to.
      if newest then
        call('ZREMRANGEBYSCORE', key, '-inf', too_old)
        call('ZREMRANGEBYRANK', key, '0', log == 'all' and beyond_all or beyond)
      end
      if not newest or tonumber(newest) < period_begin then call('PEXPIRE', key, ttl) end
      call('PUBLISH', NOTICES .. log, notice)
      tops[log] = id
    end
  end
end

local function retry(item)
  local due = text(item.due)
  local id, values = letter(item, 'retries', text(item.retry_no), 'first', text(item.first), 'due', due)
  call('XADD', RETRYING, id, unpack(values))
  call('ZADD', DUE, due, id)
  -- The longest that a due time may be ahead; see lease.lua.
  if item.timeout > number('retry_timeout') then call('HSET', META, 'retry_timeout', text(item.timeout)) end
end

local answer = {'done'}
local next_pos = items[#items].entry
for _, item in ipairs(items) do
  local outcome, id = nil, ''
  if item.fate == 'c' then
    outcome = 'committed'
    local n_more = #item.parts - 1
    -- Above the floor as well: after the clock was set back, the floor may be ahead of the clock,
    -- and streams start there.
    local first = is_continued and tonumber(meta('pending')) - n_more or math.max(last + 1, low + 1, id_of(now))
    local newest = text(first + n_more)
    for j, part in ipairs(item.parts) do
      local own = text(first + j - 1)
      if not is_continued then
        -- The record of an incomplete plan has no expiry: its owner may be down for longer than that.
        if slice == 0 and not is_final then call('SET', T .. 'e:' .. own, part.record)
        else call('SET', T .. 'e:' .. own, part.record, 'PX', ttl) end
      elseif is_final then call('PEXPIRE', T .. 'e:' .. own, ttl) end
      index(part, own)
    end
    if not is_continued then remember(item) end
    id = text(first)
    if slice >= 0 and not is_final then
      next_pos = item.entry .. '/' .. (slice + 1)
      call('HSET', META, 'pending', newest)
    else
      last = tonumber(newest)
      if is_continued then call('HDEL', META, 'pending') end
    end
  elseif item.fate == 'x' then
    outcome = 'dead-lettered'
    counts['dead_trimmed'] = (counts['dead_trimmed'] or 0) + add_dead_letter(item)
  elseif item.fate == 'r' then
    outcome = 'retrying'
    retry(item)
  else
    outcome = item.fate == 'd' and 'discarded' or item.fate == 'u' and 'unrouted' or 'duplicate'
    if outcome ~= 'duplicate' then remember(item) end
  end
  answer[#answer + 1] = outcome
  answer[#answer + 1] = id
  if not string.find(next_pos, '/', 1, true) then
    count(outcome)
    local record = {'entry', item.entry, 'outcome', outcome, 'decision', item.decision}
    local function note(field, value)
      record[#record + 1] = field
      record[#record + 1] = value
    end
    if id ~= '' then note('id', id) end
    if item.due then note('due', text(item.due)) end
    if item.due or earlier[item.entry] then
      note('attempts', text(item.attempts))
      call('HDEL', RETRIED, item.entry)
    end
    call('XADD', T .. 'decisions', 'MAXLEN', '~', ARGV[11], '*', unpack(record))
  end
end

write_marks()
for what, times in pairs(counts) do
  if times > 0 then call('HINCRBY', META, what, times) end
end
call('HSET', META, 'pos', next_pos, 'last', text(last))
if not string.find(next_pos, '/', 1, true) then
  local n = call('HINCRBY', META, 'n', #items)
  -- Done last and errors are ignored, because the source may have been deleted.
  place_group(next_pos, n)
end
return answer
