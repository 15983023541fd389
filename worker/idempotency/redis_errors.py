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
# Of a command within a script Redis 7 and 8 give no code, and Redis 7.0 does not name the command.
_FORBIDDEN_IN_SCRIPT = re.compile("The user executing the script can't|ACL failure in script")
_FORBIDDEN_COMMAND = re.compile(r"run the '([a-z|]{1,40})' command")
_CODE = re.compile(rf"(?:^|[\s:]-)({'|'.join(MEANINGS)})\b")


def code_of(error: redis.RedisError) -> str | None:
    """Return the error's code if it is one of ``MEANINGS``, else None."""
    if isinstance(error, redis.ResponseError) and _FORBIDDEN_IN_SCRIPT.search(str(error)):
        return "NOPERM"
    found = _CODE.search(str(error)) if isinstance(error, redis.ResponseError) else None
    return _CLASSES.get(type(error), found and found[1])


def meaning_of(error: redis.RedisError) -> str | None:
    """Return the error's code and what it means, and for a missing permission which one; None: it has no such code."""
    code, text = code_of(error), str(error)
    if code is None:
        return None
    meaning = MEANINGS[code]
    if code == "NOPERM":
        if found := _FORBIDDEN_COMMAND.search(text):
            meaning = f"the user may not run {found[1]}"
        elif " key" in text:
            meaning = "the user may not use the keys of WORKER_NAMESPACE"
        elif _FORBIDDEN_IN_SCRIPT.search(text):
            meaning = "the user may not run one of the commands that docs/operations.md names"
    return f"{code}: {meaning}"


class Unreachable(redis.ConnectionError):
    """There is no connection. The text says why, without secrets."""


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
