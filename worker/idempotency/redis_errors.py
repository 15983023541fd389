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
    "NOWAIT": "too few replicas confirmed in time what was written",
    "CLUSTER": "Redis Cluster is not supported: use one server, or one with replicas and Sentinels",
    "MISCONF": "it accepts no writes because it cannot save its data",
    "OOM": "out of memory",
    "NOAUTH": "it asks for a password",
    "WRONGPASS": "the user name or the password is wrong",
    "NOPERM": "the user may not do this",
}
LASTING = {"NOAUTH", "WRONGPASS", "NOPERM"}  # they last until somebody changes the user or the URL
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
    redis.exceptions.AuthenticationError: "WRONGPASS",  # on connecting: its text has no code
    redis.exceptions.AuthenticationWrongNumberOfArgsError: "NOAUTH",
}
# Up to version 6 Redis quotes the error of a command within a script: "ERR Error running script (…): -READONLY …".
# Of a command within a script Redis 7 gives no code.
_FORBIDDEN_IN_SCRIPT = "The user executing the script can't"
_CODE = re.compile(rf"(?:^|[\s:]-)({'|'.join(MEANINGS)})\b")


def code_of(error: redis.RedisError) -> str | None:
    """Return the error's code if it is one of ``MEANINGS``, else None."""
    if isinstance(error, redis.ResponseError) and _FORBIDDEN_IN_SCRIPT in str(error):
        return "NOPERM"
    found = _CODE.search(str(error)) if isinstance(error, redis.ResponseError) else None
    return _CLASSES.get(type(error), found and found[1])


class NotReplicated(redis.ResponseError):
    """A call was carried out, and too few replicas have it.

    Args:
        answer: of the call.
    """

    def __init__(self, answer: object) -> None:
        super().__init__("NOWAIT")
        self.answer = answer


def is_other_server(error: object) -> bool:
    """Tell whether an error means that another server has to be asked, so its name must be resolved again."""
    return isinstance(error, redis.RedisError) and code_of(error) in _OTHER_SERVER
