-- Refuses a caller that no longer holds the lease: KEYS[1] is the record, ARGV[2] the lease's token. A record that
-- cannot be read counts as lost; the next claim replaces it. Needs types.lua.
local r = is_type(KEYS[1], 'hash') and redis.call('HMGET', KEYS[1], 'token', 'state') or {}
if r[1] ~= ARGV[2] or r[2] ~= 'held' then return 'lost' end
