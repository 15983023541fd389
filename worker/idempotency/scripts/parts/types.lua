local function is_type(key, wanted)
    return redis.call('TYPE', key).ok == wanted
end
local function remove_lookalike(key, id)
    if is_type(key, 'set') then redis.call('SREM', key, id) end
end
