-- Prepended to the body of every script that works on a partition (see scripts.rs). These scripts
-- share their first arguments:
--     KEYS  1 source  2 `meta`
--     ARGV  1 prefix of the partition's keys, which begins with the prefix of the installation
--           2 prefix of its channels  3 its number
--           4 max_age, ms  5 limit of a log  6 limit of the log of all users
--           7 processed_entries_ttl, ms  8 dedupe window, ms  9 ids per window
--           10 dead letters  11 decisions  12 backlog  13 '1' to trim the source
--           14 and on: the script's own
-- Other keys are derived from the prefix. They need no declaration because the prefix carries the
-- hash tag, so they share the slot of the declared keys.
local T, C = ARGV[1], ARGV[2]
local S, META = KEYS[1], KEYS[2]
local OWN = 14
-- The prefix of the installation, which has no colon, and the name of its consumer group.
local P = string.match(T, '^[^:]+')
local call, pcall = redis.call, redis.pcall
-- Events for which a plugin requested a retry: their dead letters, the ids of these by due time, and
-- the earlier attempts at each entry that a retry appended to the source: `attempts retries first`,
-- with the time of the first failure in ms. Publishers cannot set them, unlike a field of an entry.
local RETRYING, DUE, RETRIED = T .. 'retrying', T .. 'due', T .. 'retried'
local clock = call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

-- Lua's tostring rounds to 14 digits; an id has up to 16.
local function text(x) return string.format('%.0f', x) end

-- The smallest notification id of a moment: milliseconds since 2024 times 4096.
local function id_of(ms) return math.max(0, ms - 1704067200000) * 4096 end

local function meta(field) return call('HGET', META, field) or nil end

local function number(field) return tonumber(meta(field) or '0') end

-- Whether entry id `a` is before `b`. Compared as text, because a sequence number may have 64 bits.
local function before(a, b)
  local ams, aseq = string.match(a, '^(%d+)-(%d+)$')
  local bms, bseq = string.match(b, '^(%d+)-(%d+)$')
  local x, y = ams, bms
  if ams == bms then x, y = aseq, bseq end
  if #x ~= #y then return #x < #y end
  return x < y
end

-- Redis generates ids from the largest on, and after the last one (2^64 ms) a stream accepts no
-- further entry. A source with an id of 2^63 ms or more is therefore set right, and continues below
-- 2^62 ms, so that this is not soon needed again.
local HIGH_ID, LOWERED_ID = '9223372036854775808-0', '4611686018427387904-0'
local function is_high(entry) return not before(entry, HIGH_ID) end

-- Whether an id is a time of day: not before 2020 and not ahead of the clock. A publisher may choose
-- any ids, such as times in seconds or microseconds, and ids that Redis chooses after a large one
-- continue from it.
local function is_time(entry)
  local ms = tonumber(string.match(entry, '^%d+'))
  return ms >= 1577836800000 and ms <= now + 60000
end

-- The time at which an entry was added, or the present if its id does not tell. Never in the future.
local function time_of(entry)
  return is_time(entry) and math.min(now, tonumber(string.match(entry, '^%d+'))) or now
end

-- The entry of a position, which may have the form `entry/k`.
local function entry_of(position) return (string.match(position, '^[^/]+')) end

-- Whether the time stored in a field of `meta` has come. A time further ahead than `furthest` was
-- set by a clock that ran fast and counts as due.
local function is_due(field, furthest)
  local wait = number(field) - now
  return wait <= 0 or wait > furthest
end

local function position() return meta('pos') or '0-0' end

-- The consumer group `P` of the source as a table; nil if either does not exist. It stands at
-- the position, so that its lag is the number of waiting entries. XINFO STREAM would be more direct,
-- but copies the first and the last entry, which may have 1 GiB.
local function group()
  local groups = pcall('XINFO', 'GROUPS', S)
  if groups.err then return nil end
  for _, one in ipairs(groups) do
    local of = {}
    for i = 1, #one, 2 do of[one[i]] = one[i + 1] end
    if of['name'] == P then return of end
  end
end

-- Moves the group to the end of the source, and creates it if it is absent. Returns the id that the
-- source generated last and the number of entries that were ever added; nil if there is no source.
local function probe()
  for _, how in ipairs({'SETID', 'CREATE'}) do
    if not pcall('XGROUP', how, S, P, '$', 'ENTRIESREAD', 0).err then
      local own = group()
      local added = own['lag'] or 0
      if added == 0 then
        -- Redis does not count behind a deleted newest entry. Rare, so that the copies matter less.
        local info = call('XINFO', 'STREAM', S)
        for i = 1, #info, 2 do if info[i] == 'entries-added' then added = info[i + 1] end end
      end
      return own['last-delivered-id'], added
    end
  end
end

-- Moves the group to the position after `n` entries.
local function place_group(pos, n)
  if not pcall('XGROUP', 'SETID', S, P, pos, 'ENTRIESREAD', n).err then return end
  local last = probe()
  -- Otherwise the source was created again with lower ids, which heal() recognises by the group.
  if last and not before(last, pos) then call('XGROUP', 'SETID', S, P, pos, 'ENTRIESREAD', n) end
end

-- The number of entries after the position. Exact unless another client trims the source; never
-- more than there are.
local function backlog()
  local length = pcall('XLEN', S)
  if type(length) ~= 'number' or length == 0 then return 0 end
  local own = group()
  local lag = own and own['lag']
  if not lag or lag < 0 then return length end
  return math.min(lag, length)
end

local BASE64URL = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_'

-- The replication id, which changes with every promotion and restart. Fails on a replica, because
-- its data may be stale.
local function replid()
  local info = call('INFO', 'replication')
  if not string.find(info, 'role:master', 1, true) then
    error({err = 'READONLY this Redis is a replica; the URL must name the primary'})
  end
  return (string.match(info, 'master_replid:(%x+)'))
end

-- The most epochs in one element of the list of epochs: every read of the head returns them.
local MOST_IN_RUN = 64

-- Begins an epoch if this primary has not served this partition before, creates `meta` if it is
-- absent, and returns the name of the epoch. Epochs are identified by name and not by number: the
-- epoch counter rolls back with the data in a failover, and a number would be issued twice.
local function epoch()
  local current = replid()
  local known, name, floor0 = unpack(call('HMGET', META, 'replid', 'epoch', 'floor0'))
  if not floor0 then
    local begin = text(id_of(now))
    local _, added = probe()
    -- Entries that left the source before this partition was created do not count as trimmed unread.
    local n = added and added - call('XLEN', S) or 0
    if added then place_group('0-0', text(n)) end
    call('HSET', META, 'floor0', begin, 'origin', begin, 'number', ARGV[3], 'max_age', ARGV[4], 'n', text(n))
  end
  if known ~= current then
    local epochs = T .. 'epochs'
    require_rights({
      {'HSET', META, 'f', 'v'}, {'HINCRBY', META, 'f', '1'},
      {'LRANGE', epochs, '0', '1'}, {'RPUSH', epochs, 'v'}, {'LTRIM', epochs, '0', '1'},
    })
    local taken, names, began = {}, '', nil
    -- Before the first write: fails on a key of the wrong type.
    for _, run in ipairs(call('LRANGE', epochs, 0, -1)) do
      names, began = string.match(run, '^(%S+) (%S+)$')
      for one in string.gmatch(names, '..') do taken[one] = true end
    end
    local epoch_no = call('HINCRBY', META, 'epoch_no', 1)
    local nonce = 0
    repeat
      local bits = tonumber(string.sub(redis.sha1hex(current .. clock[1] .. '.' .. clock[2] .. '.' .. epoch_no .. '.' .. nonce), 1, 3), 16)
      local high, low = math.floor(bits / 64) + 1, bits % 64 + 1
      name = string.sub(BASE64URL, high, high) .. string.sub(BASE64URL, low, low)
      nonce = nonce + 1
    until not taken[name]
    -- A plan in slices was announced before `last` reaches it, and its owner continues it.
    local valid = meta('pending') or meta('last') or '0'
    if began == valid then
      -- The previous epoch ended where it began: both are one element, so that restarts of an idle
      -- Redis do not push older epochs off the list.
      call('LTRIM', epochs, 0, -2)
      call('RPUSH', epochs, string.sub(names .. name, -2 * MOST_IN_RUN) .. ' ' .. valid)
    else
      call('RPUSH', epochs, name .. ' ' .. valid)
    end
    call('LTRIM', epochs, -16, -1)
    call('HSET', META, 'replid', current, 'epoch', name)
  end
  return name
end

-- Everything that expires is kept slightly longer than its age, so that a reader that has just read
-- a page still finds its records.
local GRACE = 1.02
local function lifetime(age) return math.floor(tonumber(age) * GRACE) end

-- The id below which everything is older than `span` of the age. After max_age was raised, entries
-- written under the old age still expire by the old one: `age0` is the old age, and `id0` the last
-- id it applies to.
local function id_aged(span)
  local max_age, age0, id0 = unpack(call('HMGET', META, 'max_age', 'age0', 'id0'))
  local at = id_of(now - span(max_age or ARGV[4]))
  if age0 then at = math.max(at, math.min(id_of(now - span(age0)), tonumber(id0))) end
  return at
end

-- Logs may have lost entries below this id because of their age.
local function floor() return math.max(number('floor0'), id_aged(tonumber)) end

-- Records below this id have expired, and their log entries only indicate that they existed. Never
-- above the floor, nor above a plan that is being written in slices, because its record has no
-- expiry.
local function expired()
  local at = id_aged(lifetime)
  local pending = meta('pending')
  -- The last of up to eight ids.
  return pending and math.min(at, tonumber(pending) - 7) or at
end

-- The maximum number of arguments that unpack can pass to a command, minus a reserve for the
-- command's own arguments.
local MOST_ARGUMENTS = 7800

-- Fails unless the user may run every command of a commit. Called by a commit before it writes, and
-- by a node before it takes the lease: it would evaluate events that it cannot commit.
local function require_commit_rights()
  local log, record, seen = T .. 'l:all', T .. 'e:1', T .. 'seen:1'
  local dead, decisions = T .. 'dead', T .. 'decisions'
  require_rights({
    {'HGET', META, 'f'}, {'HMGET', META, 'f'}, {'HSET', META, 'f', 'v'}, {'HDEL', META, 'f'},
    {'HINCRBY', META, 'f', '1'}, {'INFO', 'memory'}, {'XRANGE', S, '-', '+'},
    {'TYPE', dead}, {'XLEN', dead}, {'XADD', dead, '*', 'f', 'v'}, {'XINFO', 'STREAM', dead},
    {'TYPE', decisions}, {'XADD', decisions, '*', 'f', 'v'},
    {'SMISMEMBER', seen, 'v'}, {'SCARD', seen}, {'SADD', seen, 'v'}, {'UNLINK', seen},
    {'SET', record, 'v'}, {'PEXPIRE', record, '1'},
    {'ZREVRANGE', log, '0', '0'}, {'ZADD', log, '1', 'v'}, {'ZREMRANGEBYSCORE', log, '-inf', '(1'},
    {'ZREMRANGEBYRANK', log, '0', '1'}, {'PEXPIRE', log, '1'}, {'PUBLISH', C .. 'l:all', 'v'},
  })
end

-- Entries up to this size are moved within a source; of a larger one, only a dead letter is written.
local MOST_MOVED = 4194304

-- The newest id of a dead letter, of those that stay and those that are retried: an id names one.
local letter_ms, letter_seq

-- Reads the newest id. Called before the first letter(), and before the first write of a script.
local function read_letter_ids()
  letter_ms, letter_seq = now, -1
  for _, key in ipairs({T .. 'dead', RETRYING}) do
    local info = pcall('XINFO', 'STREAM', key)
    for i = 1, info.err and 0 or #info, 2 do
      if info[i] == 'last-generated-id' then
        local ms, seq = string.match(info[i + 1], '^(%d+)-(%d+)$')
        ms, seq = tonumber(ms), tonumber(seq)
        -- Beyond 53 bits a number is not exact.
        if seq >= 2 ^ 53 then ms, seq = ms + 1, -1 end
        if ms > letter_ms or ms == letter_ms and seq > letter_seq then letter_ms, letter_seq = ms, seq end
      end
    end
  end
end

-- The id of a new dead letter and everything it holds. The arguments are further fields of its own.
local function letter(item, ...)
  letter_seq = letter_seq + 1
  local fields = item.fields
  local pairs_kept = math.min(#fields, MOST_ARGUMENTS)
  local reason = item.reason
  if pairs_kept < #fields then reason = reason .. ' (only the first ' .. pairs_kept / 2 .. ' of ' .. #fields / 2 .. ' fields are kept)' end
  local values = {'entry', item.entry, 'reason', reason, 'plugin', item.plugin, 'attempts', text(item.attempts), ...}
  if item.n_bytes then
    for _, value in ipairs({'entry_bytes', item.n_bytes, 'entry_fields', item.n_fields}) do values[#values + 1] = value end
  end
  for j = 1, pairs_kept, 2 do
    values[#values + 1] = 'f:' .. fields[j]
    values[#values + 1] = fields[j + 1]
  end
  return text(letter_ms) .. '-' .. text(letter_seq), values
end

-- Adds a dead letter that stays. Returns the number of older ones that their limit removed.
local function add_dead_letter(item)
  local key = T .. 'dead'
  local n_before = call('XLEN', key)
  local id, values = letter(item)
  call('XADD', key, 'MAXLEN', ARGV[10], id, unpack(values))
  return n_before + 1 - call('XLEN', key)
end

-- The commands of refuse().
local function refusal_commands()
  local dead = T .. 'dead'
  return {'XLEN', dead}, {'XINFO', 'STREAM', dead}, {'XINFO', 'STREAM', RETRYING},
    {'XADD', dead, '*', 'f', 'v'}, {'XADD', T .. 'decisions', '*', 'f', 'v'}, {'HINCRBY', META, 'f', '1'}
end

-- Writes the dead letter and the decision of an entry that no plugin is called for. Keeps the fields
-- of an entry that can be redriven.
local function refuse(entry, fields, reason)
  local bytes = 0
  for i = 1, #fields do bytes = bytes + #fields[i] end
  local item = {entry = entry, reason = reason, plugin = '', attempts = 0, fields = fields}
  if bytes > MOST_MOVED or #fields > MOST_ARGUMENTS then
    item.fields, item.n_bytes, item.n_fields = {}, text(bytes), text(#fields / 2)
  end
  local n_trimmed = add_dead_letter(item)
  if n_trimmed > 0 then call('HINCRBY', META, 'dead_trimmed', n_trimmed) end
  local decision = cjson.encode({event_id = '', event_source = '', event_type = '', reason = reason, clock_ms = 0})
  decision = string.gsub(decision, '^{', '{"verdicts":[],', 1)
  call('XADD', T .. 'decisions', 'MAXLEN', '~', ARGV[11], '*', 'entry', entry, 'outcome', 'dead-lettered', 'decision', decision)
  call('HINCRBY', META, 'dead-lettered', 1)
end

-- Appends the entries of a source again that was deleted and created with lower ids, in order and
-- above the position: none of them would ever be read. Returns their number.
local function append_again(last, pos)
  require_rights({
    {'XRANGE', S, '-', '+'}, {'XSETID', S, '0-1'}, {'XADD', S, '*', 'f', 'v'}, {'XDEL', S, '0-1'},
    {'HSET', META, 'f', 'v'}, {'UNLINK', RETRIED}, refusal_commands(),
  })
  read_letter_ids()
  -- No entry has its id any more.
  call('UNLINK', RETRIED)
  call('XSETID', S, pos)
  local n, after = 0, '-'
  while true do
    -- One at a time: together they may be larger than the memory.
    local entry = call('XRANGE', S, after, last, 'COUNT', 1)[1]
    if not entry then return n end
    local fields, bytes = entry[2], 0
    for i = 1, #fields do bytes = bytes + #fields[i] end
    if bytes <= MOST_MOVED and #fields <= MOST_ARGUMENTS then
      call('XADD', S, '*', unpack(fields))
      call('XDEL', S, entry[1])
    else
      refuse(entry[1], fields, 'the entry is too large to be moved above the position after the source was created again with lower ids')
    end
    n, after = n + 1, '(' .. entry[1]
    if after == '(' .. last then return n end
  end
end

-- Sets a source right that has a high id. The first entry from LOWERED_ID on, whose id a publisher
-- chose, becomes a dead letter if it was not processed. Redis may have generated the later ids: these
-- entries are appended again, in order. A position among them is lowered. Returns the number of
-- entries that were appended again.
local function leave_high_ids()
  local moving = T .. 'moving'
  require_rights({
    {'XRANGE', S, '-', '+'}, {'XREVRANGE', S, '+', '-'}, {'XDEL', S, '0-1'}, {'XSETID', S, '0-1'},
    {'XADD', S, '*', 'f', 'v'}, {'XADD', moving, '*', 'f', 'v'}, {'XRANGE', moving, '-', '+'}, {'UNLINK', moving},
    {'HGET', RETRIED, 'f'}, {'HSET', RETRIED, 'f', 'v'}, {'HDEL', RETRIED, 'f'},
    {'HSET', META, 'f', 'v'}, refusal_commands(),
  })
  read_letter_ids()
  local pos = entry_of(position())
  local _, added = probe()
  call('UNLINK', moving)
  local n_refused, n_moved, is_chosen = 0, 0, true
  -- The ids of a stream only become lower if no entry is left above: what is moved waits elsewhere.
  -- One at a time: together they may be larger than the memory.
  while true do
    local entry = call('XRANGE', S, LOWERED_ID, '+', 'COUNT', 1)[1]
    if not entry then break end
    local id, fields, bytes = entry[1], entry[2], 0
    for i = 1, #fields do bytes = bytes + #fields[i] end
    if before(pos, id) then
      if is_chosen or bytes > MOST_MOVED or #fields > MOST_ARGUMENTS then
        refuse(id, fields, 'the id ' .. id .. ' is so large that Redis would soon have none left to generate; add events with XADD KEY *')
        n_refused = n_refused + 1
      else
        call('XADD', moving, id, unpack(fields))
        n_moved = n_moved + 1
      end
    end
    is_chosen = false
    call('XDEL', S, id)
  end
  local newest = call('XREVRANGE', S, '+', '-', 'COUNT', 1)[1]
  local last = newest and newest[1] or '0-1'
  if not before(pos, LOWERED_ID) then call('HSET', META, 'pos', last)
  elseif before(last, pos) then last = pos end
  -- Also forgets that larger ids were deleted: Redis could not count the entries that follow.
  call('XSETID', S, last, 'ENTRIESADDED', text(added), 'MAXDELETEDID', '0-1')
  -- They have their outcome or another id, and commits count only what they write.
  call('HINCRBY', META, 'n', n_refused + n_moved)
  local after = '-'
  for _ = 1, n_moved do
    local entry = call('XRANGE', moving, after, '+', 'COUNT', 1)[1]
    local id = call('XADD', S, '*', unpack(entry[2]))
    local attempts = call('HGET', RETRIED, entry[1])
    if attempts then
      call('HDEL', RETRIED, entry[1])
      call('HSET', RETRIED, id, attempts)
    end
    after = '(' .. entry[1]
  end
  call('UNLINK', moving)
  return n_moved
end

-- Fails unless the user may run every command of a retry.
local function require_retry_rights()
  require_rights({
    {'TYPE', RETRYING}, {'XLEN', RETRYING}, {'XINFO', 'STREAM', RETRYING}, {'XRANGE', RETRYING, '-', '+'},
    {'XADD', RETRYING, '*', 'f', 'v'}, {'XDEL', RETRYING, '0-1'},
    {'ZADD', DUE, '1', 'v'}, {'ZREM', DUE, 'v'}, {'ZRANGEBYSCORE', DUE, '0', '1'},
    {'HMGET', RETRIED, 'f'}, {'HSET', RETRIED, 'f', 'v'}, {'HDEL', RETRIED, 'f'},
    {'XADD', S, '*', 'f', 'v'},
  })
end

-- The fields of the entry of a dead letter, as names and values in turn, and the letter's own fields.
local function entry_of_letter(fields)
  local values, of = {}, {}
  for i = 1, #fields, 2 do
    if string.sub(fields[i], 1, 2) == 'f:' then
      values[#values + 1] = string.sub(fields[i], 3)
      values[#values + 1] = fields[i + 1]
    else of[fields[i]] = fields[i + 1] end
  end
  return values, of
end

-- Fails if a key has another type. Returns whether it exists.
local function require_type(key, wanted)
  local kind = call('TYPE', key).ok
  if kind ~= 'none' and kind ~= wanted then
    error({err = 'WRONGTYPE the key ' .. key .. ' is a ' .. kind .. ' but must be a ' .. wanted})
  end
  return kind ~= 'none'
end

local function require_retry_types()
  require_type(RETRYING, 'stream')
  require_type(DUE, 'zset')
  require_type(RETRIED, 'hash')
end

-- Repairs the source after other clients modified it. Returns the number of entries that were
-- trimmed before being read and the number that were appended again.
local function heal()
  local pos, n = position(), number('n')
  -- A plan that is being written in slices is completed first: it does not need the source.
  if string.find(pos, '/', 1, true) then return 0, 0 end
  local own = group()
  local last, added
  if is_high(pos) then
    last = probe()
    if not last or before(last, pos) then
      -- The source was deleted: whatever it holds now is new, and could not be moved above the position.
      pos, n = '0-0', 0
      call('HSET', META, 'pos', pos, 'n', '0')
    end
    place_group(pos, text(n))
    own, last = group(), nil
  end
  -- Looks at the last id itself once a minute: the entry may have been deleted.
  local has_high_id = own and is_high(pos) or #pcall('XRANGE', S, HIGH_ID, '+', 'COUNT', 1) > 0
  if not has_high_id and own and is_due('probe_at', 60000) then
    last, added = probe()
    has_high_id = is_high(last)
    place_group(pos, text(n))
    own = group()
    call('HSET', META, 'probe_at', text(now + 60000))
  end
  if has_high_id then
    local n_again = leave_high_ids()
    if n_again > 0 then call('HINCRBY', META, 'foreign_entries', n_again) end
    place_group(position(), text(number('n')))
    return 0, n_again
  end
  if not own or before(own['last-delivered-id'], pos) or own['entries-read'] ~= n then
    last, added = probe()
    -- There is no source.
    if not last then return 0, 0 end
    if before(last, pos) then
      local n_again = append_again(last, pos)
      call('HINCRBY', META, 'foreign_entries', n_again)
      call('HSET', META, 'n', text(added))
      place_group(pos, text(added))
      return 0, n_again
    end
    place_group(pos, text(n))
    own = group()
  end
  if own['lag'] == 0 then return 0, 0 end
  -- Only a source without waiting entries allows a conclusion: entries that were added and are not
  -- counted in `n` were removed by another client. To look may copy a large entry, so that it is not
  -- repeated at once.
  if call('XLEN', S) > 0 then
    if not is_due('look_at', 60000) then return 0, 0 end
    local waiting = call('XRANGE', S, '(' .. pos, '+', 'COUNT', 1)[1]
    if waiting then
      local bytes = 0
      for i = 1, #waiting[2] do bytes = bytes + #waiting[2][i] end
      if bytes > MOST_MOVED then call('HSET', META, 'look_at', text(now + 60000)) end
      return 0, 0
    end
  end
  if not added then last, added = probe() end
  local missing = added - n
  if missing ~= 0 then require_rights({{'HINCRBY', META, 'f', '1'}, {'HSET', META, 'f', 'v'}, {'UNLINK', RETRIED}}) end
  if missing > 0 then
    call('HINCRBY', META, 'trimmed_unread', missing)
    -- None of its entries waits any more.
    call('UNLINK', RETRIED)
  end
  if missing ~= 0 then call('HSET', META, 'n', text(added)) end
  -- At the end of the source and not at the position: Redis does not count behind a deleted entry.
  call('XGROUP', 'SETID', S, P, last, 'ENTRIESREAD', text(added))
  return math.max(0, missing), 0
end

-- Removes entries from the source that all readers have processed, and old decisions. Runs at most
-- once a second, or 20 times a second under memory pressure. A commit trims before it writes, so
-- that a full Redis can drain. A tick trims as well: after the last commit of a backlog, publishers
-- that are rejected for lack of memory would otherwise wait for the next commit, and that commit
-- for them.
local function trim()
  if not is_due('trim_at', 1000) then return end
  pcall('XTRIM', T .. 'decisions', 'MINID', '~', text(math.max(0, now - tonumber(ARGV[4]))) .. '-0')
  local memory = call('INFO', 'memory')
  local most = tonumber(string.match(memory, 'maxmemory:(%d+)'))
  -- Slightly early, so that publishers need not be rejected first.
  local is_full = most > 0 and tonumber(string.match(memory, 'used_memory:(%d+)')) > 0.95 * most
  call('HSET', META, 'trim_at', text(now + (is_full and 50 or 1000)))
  -- The source has readers without a consumer group, of which Redis does not know.
  if ARGV[13] ~= '1' then return end
  local bound = entry_of(position())
  local ttl = tonumber(ARGV[7])
  local is_timed = is_time(bound)
  local function lower(entry) if before(entry, bound) then bound = entry end end
  -- Ids that are not times do not tell when an entry was processed: the position of one `ttl` ago
  -- does.
  local marked, newer, at = unpack(call('HMGET', META, 'mark', 'next_mark', 'mark_at'))
  local elapsed = at and now - tonumber(at)
  marked = marked or '0-0'
  if not elapsed or elapsed >= ttl then
    marked = newer or marked
    call('HSET', META, 'mark', marked, 'next_mark', bound, 'mark_at', text(now))
  elseif elapsed < 0 then
    -- The clock was set back: the interval begins again.
    call('HSET', META, 'mark_at', text(now))
  end
  -- Processed entries are kept only for operators; a full Redis needs the memory.
  if not is_full then
    local kept = text(math.max(0, now - ttl)) .. '-0'
    if not is_timed or before(kept, marked) then kept = marked end
    lower(kept)
  end
  local groups = pcall('XINFO', 'GROUPS', S)
  if groups.err then return end
  for _, group in ipairs(groups) do
    local of = {}
    for i = 1, #group, 2 do of[group[i]] = group[i + 1] end
    if of['name'] ~= P then
      lower(of['last-delivered-id'])
      if of['pending'] > 0 then
        local pending = pcall('XPENDING', S, of['name'])
        -- Unknown: nothing may be removed.
        if pending.err then return end
        lower(pending[2])
      end
    end
  end
  if is_full then pcall('XTRIM', S, 'MINID', bound)
  -- Whole nodes only and a limited number of entries, to keep the call cheap; the next call
  -- continues.
  else pcall('XTRIM', S, 'MINID', '~', bound, 'LIMIT', 100000) end
end

-- Appends an entry with the field names and values ARGV[from] to ARGV[to]. Returns its id or an
-- error.
local function append_entry(from, to)
  local added = pcall('XADD', S, '*', unpack(ARGV, from, to))
  if type(added) == 'table' and string.find(added.err, 'exhausted', 1, true) then
    call('HDEL', META, 'probe_at')
    heal()
    added = pcall('XADD', S, '*', unpack(ARGV, from, to))
  end
  return added
end
