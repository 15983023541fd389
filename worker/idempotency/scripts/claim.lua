-- Claims a command. Needs clock.lua, types.lua, readable.lua, epoch.lua and place.lua.
-- KEYS: the two places of the record, as place.lua has them, lookalikes, epoch.
-- ARGV: command id, content hash, time of the claim, lease, time to live; of a replay the time of the failure and
-- its doubt's since and until; a recorded reply that could not be parsed; the epoch that the worker knows; the kind
-- of claim, as epoch.lua has them; how long after a loss first deliveries are in doubt, and redeliveries; whether
-- the delivery is a first one, as far as it says; the system that sent the command; digests of the fields of its
-- content.
-- Returns the epoch's id, its age, whether records were lost before it, and then 'key-reused', the
-- recorded digests of the fields, or 'completed', reply, or 'in-progress', since, or 'unseen' | 'known-not-sent' | 'unresolved', token, since, until, crashed,
-- whether the record is of this epoch, whether it is in the command's own place.
local app = ARGV[15]
local is_own = is_in_own_place(KEYS[1], KEYS[2], app)
local record = is_own and KEYS[2] or KEYS[1]
local owner = is_own and ARGV[1] .. '/' .. app or ARGV[1]
local lease, ttl = tonumber(ARGV[4]), tonumber(ARGV[5])
local hour = 3600000
local r, is_unreadable = {}, false
if is_type(record, 'hash') and redis.call('HSTRLEN', record, 'reply') <= 65536 then
    r = redis.call('HMGET', record, 'digest', 'state', 'lease', 'claimed', 'since', 'until', 'crashed', 'reply',
        'token', 'failed', 'epoch')
    is_unreadable = not is_readable(r, tonumber(ARGV[3]) + lease + hour, now + lease + hour)
        or (r[2] == 'done' and r[8] == ARGV[9])
elseif not is_type(record, 'none') then
    is_unreadable = true
end
local unsettled, risky = tonumber(ARGV[12]), tonumber(ARGV[13])
local epoch, began, loss = epoch_of(KEYS[4], ARGV[10], ttl, risky, ARGV[11])
local facts = {epoch, string.format('%.0f', now - began), loss}
local function answered(...)
    for _, each in ipairs({...}) do facts[#facts + 1] = each end
    return facts
end
local content_hash, state, since, till, crashed = r[1], r[2], r[5] or '', r[6] or '', r[7] or '0'
local answer = 'unseen'
-- No other lease has this token, not even one whose record was lost: every write of a former holder is refused.
local token = string.format('%.0f', math.max(t[1] * 1000000 + t[2], tonumber(not is_unreadable and r[9] or '0') + 1))
if is_unreadable then
    local recorded_app = is_type(record, 'hash') and redis.call('HMGET', record, 'app')[1]
    redis.call('DEL', record)
    redis.call('HSET', record, 'digest', ARGV[2], 'token', token)
    if recorded_app then redis.call('HSET', record, 'app', recorded_app) end
    content_hash, state, since, till, crashed = ARGV[2], 'free', '', ARGV[3], '0'
end
if content_hash then
    if content_hash ~= ARGV[2] then
        local is_short = redis.call('HSTRLEN', record, 'fields') <= 256
        return answered('key-reused', is_short and redis.call('HMGET', record, 'fields')[1] or '')
    end
    if state == 'done' then
        if ARGV[6] == '' or r[10] ~= ARGV[6] then return answered('completed', r[8]) end
        since, till, crashed = ARGV[7], ARGV[8], '0'
        redis.call('HDEL', record, 'reply', 'failed')
    end
    if state == 'held' then
        if till == '' or (since ~= '' and tonumber(r[4]) < tonumber(since)) then since = r[4] end
        if now < tonumber(r[3]) then return answered('in-progress', since) end
        local ended = tonumber(r[4]) + lease
        if till == '' or ended > tonumber(till) then till = string.format('%.0f', ended) end
        crashed = '1'
    end
    answer = till == '' and 'known-not-sent' or 'unresolved'
end
local ends = string.format('%.0f', now + lease)
local is_of_epoch = epoch ~= '' and r[11] == epoch
-- The record of an earlier attempt may be lost, as core/epoch.py judges it. Later claims find this one's record
-- instead, so it says so until its holder has recorded what it did.
local may_be_lost = content_hash and epoch ~= '' and not is_of_epoch
if not content_hash then
    redis.call('HSET', record, 'app', app)
    local age = now - began
    may_be_lost = (epoch ~= '' and loss == '1' and age < unsettled)
        or (ARGV[14] ~= '1' and (epoch == '' or age < risky))
end
if may_be_lost then
    if till == '' then since = '' end
    -- On the clock of the claim: a lease from before the epoch may last as long.
    local ends = tonumber(ARGV[3]) + (epoch == '' and 0 or math.max(0, began + lease - now))
    if till == '' or ends > tonumber(till) then till = string.format('%.0f', ends) end
end
redis.call('HSET', record, 'digest', ARGV[2], 'fields', ARGV[16], 'token', token, 'epoch', epoch, 'state', 'held', 'lease', ends,
    'claimed', ARGV[3])
if content_hash or may_be_lost then redis.call('HSET', record, 'since', since, 'until', till, 'crashed', crashed) end
redis.call('PEXPIRE', record, math.max(ttl, 2 * lease))
if not is_type(KEYS[3], 'set') then redis.call('DEL', KEYS[3]) end
redis.call('SADD', KEYS[3], owner)
redis.call('PEXPIRE', KEYS[3], math.max(ttl, 2 * lease))
return answered(answer, token, since, till, crashed, is_of_epoch and '1' or '0', is_own and '1' or '0')
