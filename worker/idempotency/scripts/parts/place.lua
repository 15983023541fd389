-- Where a command's record is: under its id alone, as earlier versions wrote it for every system, unless that record is
-- another system's; then under its id with its system. A record that names no system is anyone's. Needs types.lua.
local function is_in_own_place(plain, own, app)
    if not is_type(own, 'none') then return true end
    local recorded = is_type(plain, 'hash') and redis.call('HMGET', plain, 'app')[1]
    return recorded and recorded ~= app
end
