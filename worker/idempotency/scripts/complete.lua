-- Records an outcome and the owner of its uuid. Needs types.lua, lease.lua and owners.lua.
-- KEYS: record, lookalikes; spellings of the uuid, none if the reply has no uuid.
-- ARGV: owner id, token, time to live, reply, time of the failure, the doubt's since and until, the owner to record;
-- the kinds of the spellings.
-- Returns 'ok', 'lost', or 'taken' if the uuid belongs to another command, which then leaves this one in doubt.
if #KEYS > 2 then
    local spellings = {}
    for at = 1, #KEYS - 2 do spellings[at] = {KEYS[2 + at], ARGV[8 + at]} end
    local owner = owner_by(spellings)
    if owner and owner ~= ARGV[1] and owner ~= '?' .. ARGV[1] then
        redis.call('HSET', KEYS[1], 'state', 'free', 'since', ARGV[6], 'until', ARGV[7], 'crashed', '0')
        redis.call('PEXPIRE', KEYS[1], ARGV[3])
        return 'taken'
    end
    set_owner(spellings, owner or ARGV[8], ARGV[3])
end
redis.call('HSET', KEYS[1], 'state', 'done', 'reply', ARGV[4])
redis.call('HDEL', KEYS[1], 'lease', 'claimed', 'since', 'until', 'crashed')
redis.call('PEXPIRE', KEYS[1], ARGV[3])
remove_lookalike(KEYS[2], ARGV[1])
if ARGV[5] ~= '' then redis.call('HSET', KEYS[1], 'failed', ARGV[5]) end
return 'ok'
