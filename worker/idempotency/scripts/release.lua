-- Releases a command without an outcome. Needs types.lua and lease.lua.
-- KEYS: record, lookalikes. ARGV: owner id, token, time to live, since, until, crashed.
redis.call('HSET', KEYS[1], 'state', 'free', 'since', ARGV[4], 'until', ARGV[5], 'crashed', ARGV[6])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
if ARGV[5] == '' then remove_lookalike(KEYS[2], ARGV[1]) end
return 'ok'
