"""Error codes of Redis, for all parts that talk to it."""

import re

import redis

from worker.core.connection_faults import connection_fault

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
LASTING = {"NOAUTH", "WRONGPASS", "NOPERM"}  # until an administrator changes the user or the URL
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
_UNAUTHENTICATED = "Authentication required"
_TOO_MANY = "max number of clients reached"
_MAX_ANSWER = 100  # characters of an error of Redis that is passed on
_FORBIDDEN_COMMAND = re.compile(r"run the '([a-z|]{1,40})' command")
_CODE = re.compile(rf"(?:^|[\s:]-)({'|'.join(MEANINGS)})\b")


def code_of(error: redis.RedisError) -> str | None:
    """Return the error's code if it is one of ``MEANINGS``, else None."""
    if isinstance(error, redis.ResponseError) and _FORBIDDEN_IN_SCRIPT.search(str(error)):
        return "NOPERM"
    if isinstance(error, redis.exceptions.AuthenticationError) and _UNAUTHENTICATED in str(error):
        return "NOAUTH"
    found = _CODE.search(str(error)) if isinstance(error, redis.ResponseError) else None
    return _CLASSES.get(type(error), found and found[1])


class Unreachable(redis.ConnectionError):
    """There is no connection. The text says why, without secrets."""


class NotReplicated(redis.ResponseError):
    """A call was carried out, and too few replicas have it, as far as is known.

    Args:
        answer: of the call.
        cause: why the replicas could not be waited for; None: too few have confirmed it.
    """

    def __init__(self, answer: object, cause: redis.ResponseError | None) -> None:
        super().__init__("NOWAIT")
        self.answer = answer
        self.cause = cause


def reason_of(error: redis.RedisError, host: str | None = None) -> str:
    """Return why a call or a connection failed, in words for people. Texts that may contain a secret are left out.

    Args:
        error: of the library, or one of this module's.
        host: the name that was looked up.
    """
    if isinstance(error, NotReplicated) and error.cause is not None:
        return reason_of(error.cause)
    code, origin = code_of(error), error.__context__
    if code is not None:
        return f"{code}: {_meaning(code, str(error))}"
    if isinstance(error, redis.TimeoutError):
        return "no answer in time"
    if isinstance(error, Unreachable) or type(error) is redis.RedisError or _TOO_MANY in str(error):
        return str(error)  # of this project, or harmless
    if isinstance(error, redis.ResponseError):
        answer, _, _ = " ".join(str(error).split()).partition(", with args")  # a password may be among them
        return answer[:_MAX_ANSWER]
    if isinstance(origin, OSError | UnicodeError):
        return connection_fault(origin, host)
    return "the connection was lost" if isinstance(error, redis.ConnectionError) else "its answer cannot be read"


def _meaning(code: str, text: str) -> str:
    """Return what a code means, and for a missing permission which one."""
    if code == "NOPERM":
        if found := _FORBIDDEN_COMMAND.search(text):
            return f"the user may not run {found[1]}"
        if " key" in text:
            return "the user may not use the keys of WORKER_NAMESPACE"
        if _FORBIDDEN_IN_SCRIPT.search(text):
            return "the user may not run one of the commands that docs/security.md names"
    return MEANINGS[code]


def is_other_server(error: object) -> bool:
    """Tell whether an error means that another server has to be asked, so its name must be resolved again."""
    return isinstance(error, redis.RedisError) and code_of(error) in _OTHER_SERVER
