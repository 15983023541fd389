-- Records that a command has arrived for the first time, so that it need not be in doubt if it is redelivered
-- unclaimed.
-- Needs clock.lua, types.lua, readable.lua, epoch.lua and place.lua.
-- KEYS: the two places of the record, as place.lua has them, epoch. ARGV: content hash, time of the arrival, time to
-- live, the epoch that the worker knows, how long after a loss first deliveries are in doubt, and redeliveries; the
-- system that sent the command; digests of the fields of its content.
-- Returns the epoch's id, its age, and whether records were lost before it.
local unsettled = tonumber(ARGV[5])
local record = is_in_own_place(KEYS[1], KEYS[2], ARGV[7]) and KEYS[2] or KEYS[1]
local epoch, began, loss = epoch_of(KEYS[3], ARGV[4], tonumber(ARGV[3]), tonumber(ARGV[6]), 'claim')
-- Of a command that arrived earlier an attempt may have been lost, as of one that comes for the first time.
local is_settled = epoch ~= '' and (loss == '0' or tonumber(ARGV[2]) >= began + unsettled)
if is_settled and is_type(record, 'none') then
    redis.call('HSET', record, 'app', ARGV[7], 'digest', ARGV[1], 'token', '0', 'state', 'free', 'since', '',
        'until', '', 'crashed', '0', 'epoch', epoch, 'fields', ARGV[8])
    redis.call('PEXPIRE', record, ARGV[3])
end
return {epoch, string.format('%.0f', now - began), loss}
