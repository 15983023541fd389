-- A time is in milliseconds since 1970. One in the future would keep its command waiting, possibly forever.
local function is_time(text, latest)
    return string.find(text, '^%d+$') and #text <= 15 and tonumber(text) <= latest
end
local function is_readable(r, latest_doubt, latest_lease)
    local content_hash, state, lease, claimed, since, till, crashed, reply, token = unpack(r, 1, 9)
    if not content_hash or #content_hash ~= 32 or string.find(content_hash, '[^0-9a-f]') then return false end
    if not token or not string.find(token, '^%d+$') or #token > 16 or tonumber(token) > 9e15 then return false end
    if state == 'done' then return reply and reply ~= '' end
    if state == 'held' then
        if not lease or not is_time(lease, latest_lease) then return false end
        if not claimed or not is_time(claimed, latest_doubt) then return false end
        since, till, crashed = since or '', till or '', crashed or '0'
    elseif state ~= 'free' then
        return false
    end
    if not since or not till or (crashed ~= '0' and crashed ~= '1') then return false end
    if till == '' then return since == '' end
    if not is_time(till, latest_doubt) then return false end
    return since == '' or (is_time(since, latest_doubt) and tonumber(since) <= tonumber(till))
end
