-- The epoch: a time during which the records can have lost nothing. Another begins where the server is not the one that
-- wrote the last (a failover, a restart), and where the epoch itself is missing. It begins anew when no command was
-- claimed for as long as records live. Needs clock.lua and types.lua.
local day, month = 86400000, 2592000000
local function fact(section, name)
    local answer = redis.pcall('INFO', section)
    return type(answer) == 'string' and string.match(answer, name .. ':(%x+)') or nil
end
-- Returns the epoch's id, when it began, and whether records were lost before ('1') or it may be the first one ('0').
-- The id is empty if the server does not tell who it is. known: the epoch that the caller has seen last, or empty.
local function epoch_of(key, known, ttl, must_write)
    local run, history = fact('server', 'run_id'), fact('replication', 'master_replid')
    if not run or not history then return '', 0, '0' end
    local e = is_type(key, 'hash') and redis.call('HMGET', key, 'id', 'run', 'history', 'since', 'loss', 'used') or {}
    local id, since, loss, used = e[1], tonumber(e[4] or ''), e[5], tonumber(e[6] or '')
    local is_readable = id and e[2] and e[3] and since and used and (loss == '0' or loss == '1')
        and since <= now + 3600000 and used <= now + 3600000
    -- A server without replicas takes a new history of its own now and then; only a promotion keeps the former one.
    local is_promoted = e[3] ~= history and string.find(fact('replication', 'master_replid2') or '1', '[^0]')
    if not is_readable or e[2] ~= run or is_promoted then
        loss = (is_readable or known ~= '') and '1' or '0'
        id, since = string.format('%.0f', t[1] * 1000000 + t[2]), now
    elseif known ~= '' and known ~= id and loss == '0' then
        loss, since = '1', now -- the caller knows an earlier epoch than the worker that took this one for the first
    elseif ttl >= day and now - used > ttl then
        since, loss = now, '0' -- every record of before has expired
    elseif e[3] == history and now - used < 1000 and not must_write then
        return id, since, loss
    end
    -- Not if there is none: after any write, even of nothing, Redis lets a script use more memory than maxmemory.
    if not is_type(key, 'hash') and not is_type(key, 'none') then redis.call('DEL', key) end
    redis.call('HSET', key, 'id', id, 'run', run, 'history', history, 'since', string.format('%.0f', since),
        'loss', loss, 'used', string.format('%.0f', now))
    redis.call('PEXPIRE', key, math.max(ttl, month))
    return id, since, loss
end
