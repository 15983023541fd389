-- Who owns a uuid. An owner is a command id, perhaps with a slash and its system; after a question mark it is a
-- guess, because a lookalike could equally own the uuid. A question mark alone stands for an owner that cannot be
-- read. Needs types.lua.
--
-- A spelling is one text under which the owner may be recorded: {key, kind}. The kind is two digits: whether an owner
-- recorded under it is certain, whether new owners are recorded under it.
local function read_owner(key)
    if is_type(key, 'none') then return false end
    local owner = is_type(key, 'string') and redis.call('GETRANGE', key, 0, 385) or ''
    local _, last = string.find(owner, '^%??[%w._:-]+')
    local has_system = last and string.sub(owner, last + 1, last + 1) == '/' and #owner <= 385
    local is_owner = last and last <= 129 and (last == #owner or has_system)
    return is_owner and owner or '?'
end
local function is_guess(owner)
    return string.sub(owner, 1, 1) == '?'
end
-- Returns the first owner that is certain, else the first guess, else false.
local function owner_by(spellings)
    local guess = false
    for _, spelling in ipairs(spellings) do
        local owner = read_owner(spelling[1])
        if owner and string.sub(spelling[2], 1, 1) == '0' and not is_guess(owner) then owner = '?' .. owner end
        if owner and not is_guess(owner) then return owner end
        guess = guess or owner
    end
    return guess
end
local function set_owner(spellings, owner, ttl)
    for _, spelling in ipairs(spellings) do
        local key, kind = spelling[1], spelling[2]
        if string.sub(kind, 2, 2) == '1' and is_type(key, 'none') then
            local is_uncertain = string.sub(kind, 1, 1) == '0' and not is_guess(owner)
            redis.call('SET', key, is_uncertain and '?' .. owner or owner, 'PX', ttl)
        end
    end
end
