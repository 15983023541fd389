-- The epoch: a time during which the records can have lost nothing. Another begins where the server is not the one
-- that wrote the last (a failover, a restart), where the epoch itself is missing, and where the caller has seen
-- another one. It begins anew when no command was claimed for as long as records live, and does not age before the
-- first claim: until then nobody knows what was delivered before. Needs clock.lua, types.lua and readable.lua.
local month = 2592000000
local function fact(section, name)
    local answer = redis.pcall('INFO', section)
    return type(answer) == 'string' and string.match(answer, name .. ':(%x+)') or nil
end
-- Returns the epoch's id, when it began, and whether records were lost before ('1') or it may be the first one ('0').
-- The id is empty if the server does not tell who it is. known: the epoch that the caller has seen last, or empty.
-- risky: how long redeliveries may miss their records. kind: 'claim', 'wait' if there must be a write that replicas
-- can be waited for, 'probe' of a command that nobody has sent.
local function epoch_of(key, known, ttl, risky, kind)
    local run, replication = fact('server', 'run_id'), fact('replication', 'master_replid')
    if not run or not replication then return '', 0, '0' end
    local e = is_type(key, 'hash')
        and redis.call('HMGET', key, 'id', 'run', 'replication', 'since', 'loss', 'used', 'claimed') or {}
    local id, loss, claimed = e[1], e[5], e[7] or '0'
    local latest = now + 3600000
    local is_readable = id and #id == 16 and not string.find(id, '%D') and e[2] and e[3]
        and (loss == '0' or loss == '1') and e[4] and is_time(e[4], latest) and e[6] and is_time(e[6], latest)
    local since, used = is_readable and math.min(tonumber(e[4]), now), is_readable and tonumber(e[6])
    -- A server without replicas takes another replication id now and then; only a promotion keeps the former one.
    local is_promoted = e[3] ~= replication and string.find(fact('replication', 'master_replid2') or '1', '[^0]')
    local latest_id = math.max(tonumber(is_readable and id or '0'), tonumber(known) or 0)
    -- The caller may know an earlier epoch than the worker that took this one for the first.
    local is_known_loss = known ~= '' and known ~= id and loss == '0'
    if not is_readable or e[2] ~= run or is_promoted or latest_id > tonumber(id) or is_known_loss then
        loss = (is_readable or known ~= '') and '1' or '0'
        id, since, claimed = string.format('%.0f', math.max(t[1] * 1000000 + t[2], latest_id + 1)), now, '0'
    elseif now - used > math.max(ttl, risky) then
        since, loss = now, '0' -- every record of before has expired
    elseif claimed ~= '1' then
        since = now
    elseif e[3] == replication and now - used < 1000 and kind ~= 'wait' then
        return id, since, loss
    end
    if kind ~= 'probe' then claimed = '1' end
    -- Not if there is none: after any write, even of nothing, Redis lets a script use more memory than maxmemory.
    if not is_type(key, 'hash') and not is_type(key, 'none') then redis.call('DEL', key) end
    redis.call('HSET', key, 'id', id, 'run', run, 'replication', replication, 'since', string.format('%.0f', since),
        'loss', loss, 'used', string.format('%.0f', now), 'claimed', claimed)
    redis.call('PEXPIRE', key, math.max(ttl, month))
    return id, since, loss
end
