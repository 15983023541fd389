-- Reads who owns each of several uuids, and which lookalikes compete for them. Writes nothing.
-- Needs clock.lua, types.lua, lease.lua and owners.lua.
-- KEYS: record, lookalikes. ARGV: command id, token, prefix of all keys; per uuid the number of its spellings, and those.
-- Returns 'lost' or {number of lookalikes, whether one of them holds a lease, the owner of each uuid or an empty text}.
local lookalikes, is_held = 0, false
for _, id in ipairs(is_type(KEYS[2], 'set') and redis.call('SMEMBERS', KEYS[2]) or {}) do
    local record = ARGV[3] .. 'command:' .. id
    if id ~= ARGV[1] and not is_type(record, 'none') then
        local state = is_type(record, 'hash') and redis.call('HMGET', record, 'state', 'lease') or {}
        local ends = tonumber(state[2] or '')
        is_held = is_held or (state[1] == 'held' and ends and now < ends and ends < now + 3600000)
        lookalikes = lookalikes + 1
    end
end
local facts, at = {lookalikes, is_held and 1 or 0}, 4
while at <= #ARGV do
    local last = at + tonumber(ARGV[at])
    facts[#facts + 1] = owner_by({unpack(ARGV, at + 1, last)}) or ''
    at = last + 1
end
return facts
