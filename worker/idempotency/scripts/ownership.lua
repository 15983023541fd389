-- Reads who owns each of several uuids, and which lookalikes compete for them. Writes nothing.
-- Needs clock.lua, types.lua, lease.lua and owners.lua.
-- KEYS: record, lookalikes, the records of the lookalikes, the spellings of the uuids.
-- ARGV: owner id, token, number of lookalikes, their owner ids; per uuid the number of its spellings, and their kinds.
-- Returns 'lost', or {'more', the owner ids of all lookalikes} if there are others than the caller names, or {number of
-- lookalikes, whether one of them holds a lease, the owner of each uuid or an empty text}.
local known = tonumber(ARGV[3])
local record_of = {}
for at = 1, known do record_of[ARGV[3 + at]] = KEYS[2 + at] end
local members = is_type(KEYS[2], 'set') and redis.call('SMEMBERS', KEYS[2]) or {}
local lookalikes, is_held = 0, false
for _, id in ipairs(members) do
    local record = record_of[id]
    if id ~= ARGV[1] then
        if not record then return {'more', members} end
        if not is_type(record, 'none') then
            local state = is_type(record, 'hash') and redis.call('HMGET', record, 'state', 'lease') or {}
            local ends = tonumber(state[2] or '')
            is_held = is_held or (state[1] == 'held' and ends and now < ends and ends < now + 3600000)
            lookalikes = lookalikes + 1
        end
    end
end
local facts, key, at = {lookalikes, is_held and 1 or 0}, 2 + known, 4 + known
while at <= #ARGV do
    local spellings = {}
    for number = 1, tonumber(ARGV[at]) do spellings[number] = {KEYS[key + number], ARGV[at + number]} end
    facts[#facts + 1] = owner_by(spellings) or ''
    key, at = key + #spellings, at + 1 + #spellings
end
return facts
