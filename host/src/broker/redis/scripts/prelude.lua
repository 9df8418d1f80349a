-- Stands before the body of every script about a partition (see scripts.rs). All scripts have the first arguments in common:
--   KEYS  1 the source  2 `meta`
--   ARGV  1 prefix of the partition's keys  2 prefix of its channels  3 its number  4 max_age, ms  5 cap of a log  6 cap of everyone's
--         7 keep, ms  8 dedupe window, ms  9 ids in a window  10 dead letters  11 decisions  12 backlog;  13 on: the script's own
-- Further keys are made from the prefix. They need no declaration as they share the slot of those declared: the prefix carries the tag.
local T, C = ARGV[1], ARGV[2]
local S, META = KEYS[1], KEYS[2]
local OWN = 13
local call, pcall = redis.call, redis.pcall
local clock = call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

-- Lua's own tostring rounds to 14 digits; an id has up to 16.
local function text(x) return string.format('%.0f', x) end

-- The smallest notification id of a moment: milliseconds since 2024, times 4096.
local function id_of(ms) return math.max(0, ms - 1704067200000) * 4096 end

local function meta(field) return call('HGET', META, field) or nil end

local function number(field) return tonumber(meta(field) or '0') end

-- Whether entry id `a` is before `b`. As text, because a sequence number may have 64 bits.
local function before(a, b)
  local ams, aseq = string.match(a, '^(%d+)-(%d+)$')
  local bms, bseq = string.match(b, '^(%d+)-(%d+)$')
  local x, y = ams, bms
  if ams == bms then x, y = aseq, bseq end
  if #x ~= #y then return #x < #y end
  return x < y
end

-- The entry of a position, which may be `entry/k`.
local function entry_of(position) return (string.match(position, '^[^/]+')) end

-- Whether the moment in a field of `meta` has come. One that lies further ahead than it is ever set was set by a clock that ran fast.
local function is_due(field, furthest)
  local wait = number(field) - now
  return wait <= 0 or wait > furthest
end

local function position() return meta('pos') or '0-0' end

-- What Redis says about the source, by name; nil if there is none.
local function source()
  local info = pcall('XINFO', 'STREAM', S)
  if info.err then return nil end
  local found = {}
  for i = 1, #info, 2 do found[info[i]] = info[i + 1] end
  return found
end

-- Whether nothing lies beyond the position.
local function is_caught_up(found)
  local tail = found['last-entry']
  return not tail or not before(entry_of(position()), tail[1])
end

-- Entries beyond the position: exact while nobody else trims the source, never more than there are.
local function backlog()
  local found = source()
  if not found or is_caught_up(found) then return 0 end
  local added = found['entries-added'] - number('n')
  if added < 1 or added > found['length'] then return found['length'] end
  return added
end

local BASE64URL = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_'

-- The replication id, which changes with every promotion and restart. A replica answers nothing: what it says is old.
local function replid()
  local info = call('INFO', 'replication')
  if not string.find(info, 'role:master', 1, true) then
    error({err = 'READONLY this Redis is a replica; the URL must name the primary'})
  end
  return (string.match(info, 'master_replid:(%x+)'))
end

-- Begins a life if this primary has not served this partition before, makes `meta` if it is absent, and answers the name of the life.
-- A name, not a number: `life_no` rolls back with the data in a fail-over, and would be given out twice.
local function life()
  local current = replid()
  local known, name, floor0 = unpack(call('HMGET', META, 'replid', 'life', 'floor0'))
  if not floor0 then
    local begin = text(id_of(now))
    local found = source()
    -- What had left the source before this partition was made was never ours to lose.
    local n = found and found['entries-added'] - found['length'] or 0
    call('HSET', META, 'floor0', begin, 'origin', begin, 'number', ARGV[3], 'max_age', ARGV[4], 'n', text(n))
  end
  if known ~= current then
    local life_no = call('HINCRBY', META, 'life_no', 1)
    local taken = {}
    for _, one in ipairs(call('LRANGE', T .. 'lives', 0, -1)) do taken[string.sub(one, 1, 2)] = true end
    local nonce = 0
    repeat
      local bits = tonumber(string.sub(redis.sha1hex(current .. clock[1] .. '.' .. clock[2] .. '.' .. life_no .. '.' .. nonce), 1, 3), 16)
      local high, low = math.floor(bits / 64) + 1, bits % 64 + 1
      name = string.sub(BASE64URL, high, high) .. string.sub(BASE64URL, low, low)
      nonce = nonce + 1
    until not taken[name]
    call('RPUSH', T .. 'lives', name .. ' ' .. (meta('last') or '0'))
    call('LTRIM', T .. 'lives', -16, -1)
    call('HSET', META, 'replid', current, 'life', name)
  end
  return name
end

-- What is kept for an age lives a little longer, so that a reader who has just read a page still finds its records.
local GRACE = 1.02
local function lifetime(age) return math.floor(tonumber(age) * GRACE) end

-- Below this id, all is older than `span` says of the age. After max_age was raised, what was written under the old one still expires by
-- it: `age0` is the old age, and `id0` the last id that it applies to.
local function id_aged(span)
  local max_age, age0, id0 = unpack(call('HMGET', META, 'max_age', 'age0', 'id0'))
  local at = id_of(now - span(max_age or ARGV[4]))
  if age0 then at = math.max(at, math.min(id_of(now - span(age0)), tonumber(id0))) end
  return at
end

-- Below this id, logs may have lost entries to age.
local function floor() return math.max(number('floor0'), id_aged(tonumber)) end

-- Below this id, records have expired, and what a log still says of them only tells that they were. Never above the floor, nor above a plan
-- that is being sliced, whose record has no expiry.
local function expired()
  local at = id_aged(lifetime)
  local pending = meta('pending')
  return pending and math.min(at, tonumber(pending)) or at
end

-- The most arguments that unpack can give to a command, less some for the command's own.
local MOST_ARGUMENTS = 7800

-- Looks after the source where others wrote to it behind our back. Answers how many entries were lost and how many appended again.
local function heal()
  local found = source()
  if not found then return 0, 0 end
  local pos = entry_of(position())
  if before(found['last-generated-id'], pos) then
    -- It was deleted and made again with lower ids: nothing in it would ever be read. All that is in it is new to us; it is appended
    -- again, above the position, in its order.
    local strays = call('XRANGE', S, '-', '+')
    call('XSETID', S, pos)
    for _, stray in ipairs(strays) do
      call('XADD', S, '*', unpack(stray[2], 1, math.min(#stray[2], MOST_ARGUMENTS)))
      call('XDEL', S, stray[1])
    end
    call('HINCRBY', META, 'strays', #strays)
    call('HSET', META, 'n', text(found['entries-added']))
    return 0, #strays
  elseif not string.find(position(), '/', 1, true) and is_caught_up(found) then
    -- Only now can one tell: what was added and neither counted by us nor waits was removed by somebody else.
    local missing = found['entries-added'] - number('n')
    if missing > 0 then call('HINCRBY', META, 'lost_upstream', missing) end
    if missing ~= 0 then call('HSET', META, 'n', text(found['entries-added'])) end
    return math.max(0, missing), 0
  end
  return 0, 0
end

-- Removes from the source what everybody has read, and decisions by age; at most once a second, or 20 times under memory pressure. In a
-- commit it comes first, so that a full Redis drains; and a tick does it as well: after the last commit of a backlog, publishers that
-- are refused for want of memory would otherwise wait for a commit, and the commit for them.
local function trim()
  if not is_due('trim_at', 1000) then return end
  pcall('XTRIM', T .. 'what', 'MINID', '~', text(math.max(0, now - tonumber(ARGV[4]))) .. '-0')
  local memory = call('INFO', 'memory')
  local most = tonumber(string.match(memory, 'maxmemory:(%d+)'))
  -- A little early, so that publishers need not be refused first.
  local is_full = most > 0 and tonumber(string.match(memory, 'used_memory:(%d+)')) > 0.95 * most
  call('HSET', META, 'trim_at', text(now + (is_full and 50 or 1000)))
  -- A source that is not ours by name may have readers that we cannot know.
  if string.sub(S, 1, 10) ~= 'pointsman:' then return end
  local bound = entry_of(position())
  local function lower(entry) if before(entry, bound) then bound = entry end end
  -- `keep` is for operators who look back; a full Redis needs the room.
  if not is_full then lower(text(math.max(0, now - tonumber(ARGV[7]))) .. '-0') end
  local groups = pcall('XINFO', 'GROUPS', S)
  if groups.err then return end
  for _, group in ipairs(groups) do
    local of = {}
    for i = 1, #group, 2 do of[group[i]] = group[i + 1] end
    if of['name'] ~= 'pointsman' then
      lower(of['last-delivered-id'])
      if of['pending'] > 0 then lower(call('XPENDING', S, of['name'])[2]) end
    end
  end
  if is_full then pcall('XTRIM', S, 'MINID', bound)
  -- Whole nodes only, and a bounded number: cheap, and the rest goes next time.
  else pcall('XTRIM', S, 'MINID', '~', bound, 'LIMIT', 100000) end
end
