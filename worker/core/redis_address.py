"""The URL of Redis, checked whole: no option of it is left for a library to find wrong later. Pure.

The files that it names are checked with the settings.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from urllib.parse import SplitResult, unquote, urlsplit

from worker.core.urls import HOW_TO_WRITE, NUMBER, USER, UrlForm

MAX_TIMEOUT_S = 60.0
_PORT, _SENTINEL_PORT = 6379, 26379
_WANTED = (
    "memory://, redis://user:password@host:port/number, rediss://… for TLS, or "
    "redis+sentinel://user:password@host:port,host:port/master name/number, rediss+sentinel://… for TLS; "
    "within user and password " + HOW_TO_WRITE
)
_SERVER = UrlForm("redis", "rediss", user=USER, path=NUMBER, wanted=_WANTED, has_options=True)
_SENTINEL = UrlForm(
    "redis+sentinel",
    "rediss+sentinel",
    user=USER,
    path=r"/[A-Za-z0-9._-]{1,200}(?:/[0-9]{0,9})?",
    wanted=_WANTED,
    has_options=True,
)
_NODES = re.compile(r"(?P<before>[^/]*//(?:.*@)?)(?P<nodes>[^/@?]*)(?P<after>.*)")


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,4}(?:\.[0-9]{1,6})?", text) or not 0 < float(text) <= MAX_TIMEOUT_S:
        raise ValueError(f"must be a number of seconds, above 0 and up to {MAX_TIMEOUT_S:g}, without a unit")
    return float(text)


def _whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError("must be a whole number")
    return int(text)


def _flag(text: str) -> bool:
    if text.lower() not in {"true", "yes", "1", "false", "no", "0"}:
        raise ValueError("must be true or false")
    return text.lower() in {"true", "yes", "1"}


def _protocol(text: str) -> int:
    if text not in {"2", "3"}:
        raise ValueError("must be 2 or 3")
    return int(text)


def _requirement(text: str) -> str:
    if text.lower() not in {"required", "optional", "none"}:
        raise ValueError("must be required, optional or none")
    return text.lower()


def _name(text: str) -> str:
    if not re.fullmatch(r"[!-~]{1,100}", text):
        raise ValueError("must be of printable characters of ASCII, without a blank")
    return text


_OPTIONS: Mapping[str, Callable[[str], object]] = MappingProxyType(
    {
        "db": _whole,
        "protocol": _protocol,
        "username": str,
        "password": str,
        "client_name": _name,
        "socket_timeout": _seconds,
        "socket_connect_timeout": _seconds,
        "socket_keepalive": _flag,
        "health_check_interval": _whole,
    }
)
_TLS_OPTIONS: Mapping[str, Callable[[str], object]] = MappingProxyType(
    {
        "ssl_ca_certs": str,
        "ssl_certfile": str,
        "ssl_keyfile": str,
        "ssl_cert_reqs": _requirement,
        "ssl_check_hostname": _flag,
    }
)
_SENTINEL_OPTIONS: Mapping[str, Callable[[str], object]] = MappingProxyType(
    {"sentinel_username": str, "sentinel_password": str}
)


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Where Redis is, and how to connect to it.

    Attributes:
        nodes: host and port of the server, or of each Sentinel.
        master: the name by which the Sentinels know the primary; None: ``nodes`` is the server itself.
        is_encrypted: TLS, to the Sentinels too.
        options: of every connection to the server, by the names of redis-py.
        sentinel_options: of every connection to a Sentinel.
    """

    nodes: tuple[tuple[str, int], ...]
    master: str | None
    is_encrypted: bool
    options: Mapping[str, object]
    sentinel_options: Mapping[str, object]

    def __str__(self) -> str:
        """Name hosts and ports; the other parts of the URL may be secrets, or parts of one."""
        nodes = ", ".join(f"{host}:{port}" for host, port in self.nodes)
        return f"Redis at {nodes}" if self.master is None else f"Redis, by the Sentinels at {nodes}"

    @classmethod
    def parse(cls, url: str) -> "RedisAddress":
        """Read a URL of ``redis://``, ``rediss://``, ``redis+sentinel://`` or ``rediss+sentinel://``.

        Raises:
            ValueError: it is none, or an option of it cannot be used. The message quotes no value.
        """
        scheme, separator, rest = url.partition("://")
        url = f"{scheme.lower()}{separator}{rest}"
        has_sentinels = scheme.lower().endswith("+sentinel")
        form, default_port = (_SENTINEL, _SENTINEL_PORT) if has_sentinels else (_SERVER, _PORT)
        found = _NODES.fullmatch(url)
        if found is None:
            raise ValueError(f"must be {_WANTED}")
        names = found["nodes"].split(",") if has_sentinels else [found["nodes"]]
        parts = [urlsplit(form.check(f"{found['before']}{name}{found['after']}")) for name in names]
        nodes = tuple((each.hostname or "", each.port or default_port) for each in parts)
        first, path = parts[0], parts[0].path.strip("/").split("/")
        master = path.pop(0) if has_sentinels else None
        is_encrypted = first.scheme.startswith("rediss")
        options = _options(first, is_encrypted=is_encrypted, has_sentinels=has_sentinels)
        options = {"db": int(path[0]) if path and path[0] else 0} | _user(first) | options
        sentinel_options = {
            name.removeprefix("sentinel_"): options.pop(name) for name in _SENTINEL_OPTIONS if name in options
        }
        sentinel_options |= {name: value for name, value in options.items() if name.startswith("ssl_")}
        return cls(nodes, master, is_encrypted, options, sentinel_options)


def _user(url: SplitResult) -> dict[str, object]:
    found = {"username": url.username, "password": url.password}
    return {name: unquote(value) for name, value in found.items() if value}


def _options(url: SplitResult, *, is_encrypted: bool, has_sentinels: bool) -> dict[str, object]:
    """Return the options after the question mark.

    Raises:
        ValueError: one is unknown, is set twice, or has an unusable value.
    """
    known = {**_OPTIONS, **(_SENTINEL_OPTIONS if has_sentinels else {}), **(_TLS_OPTIONS if is_encrypted else {})}
    options: dict[str, object] = {}
    for option in filter(None, url.query.split("&")):
        name, _, value = map(unquote, option.partition("="))  # not parse_qsl: a plus stays one, as before the @
        if name in _TLS_OPTIONS and not is_encrypted:
            scheme = url.scheme.replace("redis", "rediss", 1)
            raise ValueError(f"an option after ? cannot be used: {name}: needs TLS, {scheme}://")
        if name not in known:  # not quoted: it may be a part of a password
            raise ValueError(f"an option after ? is not known; there are {', '.join(sorted(known))}")
        if name in options:
            raise ValueError(f"an option after ? cannot be used: {name}: is set twice")
        try:
            options[name] = known[name](value)
        except ValueError as exc:
            raise ValueError(f"an option after ? cannot be used: {name}: {exc}") from exc
    if "ssl_keyfile" in options and "ssl_certfile" not in options:
        raise ValueError("an option after ? cannot be used: ssl_keyfile: needs ssl_certfile")
    if "ssl_certfile" in options:
        options["ssl_password"] = ""  # otherwise OpenSSL asks on the terminal for that of an encrypted key, and waits
    return options
