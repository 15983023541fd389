-- Claims a command. Needs clock.lua, types.lua and readable.lua.
-- KEYS: record, lookalikes.
-- ARGV: command id, content hash, time of the claim, lease, time to live; of a replay the time of the failure and its
-- doubt's since and until; a recorded reply that could not be parsed.
-- Returns {'key-reused'}, {'completed', reply}, {'in-progress', since} or {'unseen' | 'known-not-sent' | 'unresolved',
-- token, since, until, crashed, whether the record includes the latest claim}.
local lease, ttl = tonumber(ARGV[4]), tonumber(ARGV[5])
local hour = 3600000
local r, is_unreadable = {}, false
if is_type(KEYS[1], 'hash') and redis.call('HSTRLEN', KEYS[1], 'reply') <= 65536 then
    r = redis.call('HMGET', KEYS[1], 'digest', 'state', 'lease', 'claimed', 'since', 'until', 'crashed', 'reply',
        'token', 'failed')
    is_unreadable = not is_readable(r, tonumber(ARGV[3]) + lease + hour, now + lease + hour)
        or (r[2] == 'done' and r[8] == ARGV[9])
elseif not is_type(KEYS[1], 'none') then
    is_unreadable = true
end
local content_hash, state, since, till, crashed = r[1], r[2], r[5] or '', r[6] or '', r[7] or '0'
local answer, is_latest = 'unseen', state == 'held'
if is_unreadable then
    -- The token is higher than any that was counted, so that every write of a former holder is refused.
    local token = string.format('%.0f', t[1] * 1000000 + t[2])
    redis.call('DEL', KEYS[1])
    redis.call('HSET', KEYS[1], 'digest', ARGV[2], 'token', token)
    content_hash, state, since, till, crashed = ARGV[2], 'free', '', ARGV[3], '0'
end
if content_hash then
    if content_hash ~= ARGV[2] then return {'key-reused'} end
    if state == 'done' then
        if ARGV[6] == '' or r[10] ~= ARGV[6] then return {'completed', r[8]} end
        since, till, crashed = ARGV[7], ARGV[8], '0'
        redis.call('HDEL', KEYS[1], 'reply', 'failed')
    end
    if state == 'held' then
        if till == '' or (since ~= '' and tonumber(r[4]) < tonumber(since)) then since = r[4] end
        if now < tonumber(r[3]) then return {'in-progress', since} end
        local ended = tonumber(r[4]) + lease
        if till == '' or ended > tonumber(till) then till = string.format('%.0f', ended) end
        crashed = '1'
    end
    answer = till == '' and 'known-not-sent' or 'unresolved'
end
local token = 1
local ends = string.format('%.0f', now + lease)
if content_hash then
    token = redis.call('HINCRBY', KEYS[1], 'token', 1)
    redis.call('HSET', KEYS[1], 'state', 'held', 'lease', ends, 'claimed', ARGV[3],
        'since', since, 'until', till, 'crashed', crashed)
else
    redis.call('HSET', KEYS[1], 'digest', ARGV[2], 'state', 'held', 'lease', ends, 'claimed', ARGV[3],
        'token', token)
end
redis.call('PEXPIRE', KEYS[1], math.max(ttl, 2 * lease))
if not is_type(KEYS[2], 'set') then redis.call('DEL', KEYS[2]) end
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('PEXPIRE', KEYS[2], math.max(ttl, 2 * lease))
return {answer, string.format('%.0f', token), since, till, crashed, is_latest and '1' or '0'}
