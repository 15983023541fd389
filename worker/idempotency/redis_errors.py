"""Error codes of Redis, for all parts that talk to it."""

import re

import redis

# Error codes of Redis that say it did not do what it was asked, and their meanings.
MEANINGS = {
    "READONLY": "not a primary any more",
    "MOVED": "another node of the cluster has the keys",
    "ASK": "another node of the cluster is taking over the keys",
    "TRYAGAIN": "the cluster is moving the keys",
    "LOADING": "still reading its data",
    "MASTERDOWN": "a replica without its primary",
    "CLUSTERDOWN": "the cluster is down",
    "NOREPLICAS": "too few replicas to accept writes",
    "MISCONF": "it accepts no writes because it cannot save its data",
    "OOM": "out of memory",
    "NOAUTH": "it asks for a password",
    "WRONGPASS": "the user name or the password is wrong",
    "NOPERM": "the user may not do this",
}
_OTHER_SERVER = {"READONLY", "MOVED", "ASK", "LOADING", "MASTERDOWN", "CLUSTERDOWN"}
_CLASSES: dict[type[redis.RedisError], str] = {
    redis.exceptions.ReadOnlyError: "READONLY",
    redis.exceptions.MovedError: "MOVED",
    redis.exceptions.AskError: "ASK",
    redis.exceptions.TryAgainError: "TRYAGAIN",
    redis.exceptions.BusyLoadingError: "LOADING",
    redis.exceptions.MasterDownError: "MASTERDOWN",
    redis.exceptions.ClusterDownError: "CLUSTERDOWN",
    redis.exceptions.OutOfMemoryError: "OOM",
    redis.exceptions.NoPermissionError: "NOPERM",
}
# Up to version 6 Redis quotes the error of a command within a script: "ERR Error running script (…): -READONLY …".
_CODE = re.compile(rf"(?:^|[\s:]-)({'|'.join(MEANINGS)})\b")


def code_of(error: redis.RedisError) -> str | None:
    """Return the error's code if it is one of ``MEANINGS``, else None."""
    found = _CODE.search(str(error)) if isinstance(error, redis.ResponseError) else None
    return _CLASSES.get(type(error), found and found[1])


def is_other_server(error: object) -> bool:
    """Tell whether an error means that another server has to be asked, so its name must be resolved again."""
    return isinstance(error, redis.RedisError) and code_of(error) in _OTHER_SERVER
