-- Leases are measured on the clock of Redis, which all workers share. A doubt's times come from the workers.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
