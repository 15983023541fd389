"""Validation of the URLs in settings and environment, stricter than that of any library.

Libraries disagree about malformed URLs. In ``amqp://user:12/secret@host`` some take ``user`` for the host and the
password for a path, and print both. So every URL is validated here first; all libraries read an accepted URL alike.
Source: https://www.rfc-editor.org/rfc/rfc3986#appendix-A
"""

import re
from collections.abc import Iterator
from ipaddress import IPv6Address
from urllib.parse import quote, unquote

_MAX_PORT = 65535
_ENCODED = r"%(?!00)[0-9A-Fa-f]{2}"  # some protocols end a text at NUL
_PLAIN = r"-A-Za-z0-9._~!$&'()*+,;="  # RFC 3986: unreserved and sub-delims
_UNAMBIGUOUS = r"^{}|`\"<>"  # RFC 3986 requires them to be encoded; pika and redis-py accept them literally
_NAME = rf"(?:[{_PLAIN}{_UNAMBIGUOUS}]|{_ENCODED})*"
_PASSWORD = rf"(?:[{_PLAIN}:{_UNAMBIGUOUS}]|{_ENCODED})*"
# One byte of a path. RFC 3986 allows @ in a path, but it is a sign of an unencoded slash in a password.
_BYTE = rf"(?:[{_PLAIN}:]|{_ENCODED})"
_HOST = r"(?![-.])(?:[A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._~-]+)?\]"
_OPTION = rf"[A-Za-z_]+=(?:[!\"$'-?A-~]|{_ENCODED})+"  # neither & nor @ nor #
_QUERY = rf"(?:{_OPTION}(?:&{_OPTION})*)?"

NO_USER = ""
USER = rf"(?:{_NAME}(?::{_PASSWORD})?@)?"
STRICT_USER = rf"(?:(?:[{_PLAIN}]|{_ENCODED})*(?::{_BYTE}*)?@)?"
USER_WITH_PASSWORD = rf"(?:{_NAME}:{_PASSWORD}@)?"
# Other programs share the environment's proxy with the worker and accept more than RFC 3986 does, such as an e-mail
# address for the user name. The user info ends at the last @, so that the URL has one meaning all the same. Brackets
# are refused: the standard library takes what is between them for an address, and quotes it in its error.
SHARED_USER = r"(?:[^\s\x00-\x1f\x7f/?#\\\[\]]*@)?"
# AMQP limits names to 255 bytes; pika ends a name at a semicolon.
ONE_SEGMENT = rf"(?:/(?:(?!;){_BYTE}){{0,255}})?"
MANY_SEGMENTS = rf"(?:/{_BYTE}*)*"
NUMBER = r"(?:/[0-9]{0,9})?"
SLASH = r"/?"

HOW_TO_WRITE = (
    "write / as %2F, @ as %40, : as %3A, ; as %3B, ? as %3F, # as %23, % as %25, a comma as %2C, a blank as %20, and "
    "other special characters likewise"
)


# What a refused URL may be told to have where it must not: common enough in passwords to give nothing away.
_NAMED = "/@:;?#%[]\\ ,"
_NAMES = {" ": "blank"}
_PORTS = f"from 1 to {_MAX_PORT}"


class UrlForm:
    """One form of URLs.

    Args:
        schemes: the allowed schemes, in lower case.
        user: ``NO_USER``, ``USER``, ``STRICT_USER``, ``USER_WITH_PASSWORD`` or ``SHARED_USER``.
        path: ``ONE_SEGMENT``, ``MANY_SEGMENTS``, ``NUMBER`` or ``SLASH``.
        wanted: the form in words, for people.
        path_name: what the path is, for people; empty: it may hold nothing that people choose.
        has_options: whether there may be a query, ``name=value&name=value``.
    """

    def __init__(
        self, *schemes: str, user: str, path: str, wanted: str, path_name: str = "", has_options: bool = False
    ) -> None:
        query = rf"(?:\?{_QUERY})?" if has_options else ""
        self._schemes = schemes
        self._has_user = user != NO_USER
        self._wanted = wanted
        self._path_name = path_name
        self._pattern = re.compile(
            rf"(?:{'|'.join(map(re.escape, schemes))})://{user}(?P<host>{_HOST})(?::(?P<port>[0-9]{{1,5}}))?{path}{query}"
        )

    def check(self, text: str) -> str:
        """Return the URL with its scheme in lower case, which some libraries require.

        Raises:
            ValueError: the text is not a URL of this form. The message begins with a verb, says what is probably wrong,
                or else the form, and quotes nothing of the text, which may hold a password.
        """
        scheme, separator, rest = text.partition("://")
        url = f"{scheme.lower()}{separator}{rest}"
        if not self._matches(url):
            raise ValueError(self._cause(url) or f"must be {self._wanted}")
        return url

    def _matches(self, url: str) -> bool:
        found = self._pattern.fullmatch(url)
        if found is None or not _is_decodable(url):
            return False
        if found["port"] is not None and not 1 <= int(found["port"]) <= _MAX_PORT:
            return False
        return not found["host"].startswith("[") or _is_ipv6(found["host"][1:-1])

    def _cause(self, url: str) -> str:
        """Return what is probably wrong with a URL, if a change of it makes it one of this form; else nothing."""
        if url != url.strip() and self._matches(url.strip()):
            return "has a blank or a line break before it or after it"
        scheme, separator, rest = url.partition("://")
        if not separator or scheme not in self._schemes:
            return ""
        user, at, after = rest.rpartition("@")
        if at and not self._has_user and self._matches(f"{scheme}://{after}"):
            return "must have no user and no password: there are settings for the credentials"
        if at and ":" not in user and self._matches(f"{scheme}://{_encoded_user(user)}:x@{after}"):
            return "must have a password after its user name: user:password@host"
        likely = [
            (len(chars), place, _listed(chars))
            for place, chars, url in self._readings(scheme, rest)
            if self._matches(url)
        ]
        if likely:
            _, place, found = min(likely)
            return f"has {found} in its {place}"
        user, at, after = rest.rpartition("@")
        with_other_port = re.sub(r"^([^/?#]*):[^:/?#\]]*", r"\1:1", after)
        if self._matches(f"{scheme}://{user}{at}{with_other_port}"):
            missing = "" if at or not self._has_user else ", and a user and password must end with @"
            return f"must have a number {_PORTS} after the colon behind the host{missing}"
        return ""

    def _readings(self, scheme: str, rest: str) -> Iterator[tuple[str, set[str], str]]:
        """Yield where special characters may be that are not escaped, which, and the URL with all of them escaped."""
        user, at, after = rest.rpartition("@")
        if at and self._has_user:
            place = "user name or password"
            yield place, _unescaped(user), f"{scheme}://{_encoded_user(user)}@{after}"
            host, slash, path = after.partition("/")
            if self._path_name and _unescaped(user) and _unescaped_in_path(path):
                chars = _unescaped(user) | _unescaped_in_path(path)
                changed = f"{scheme}://{_encoded_user(user)}@{host}{slash}{_encoded_path(path)}"
                yield f"{place}, and in its {self._path_name}", chars, changed
        if self._path_name:
            user, at, after = rest.partition("@") if "@" in rest else ("", "", rest)
            host, slash, path = after.partition("/")
            changed = f"{scheme}://{user}{at}{host}{slash}{_encoded_path(path)}"
            yield self._path_name, _unescaped_in_path(path), changed


def _encoded_user(user: str) -> str:
    name, colon, password = user.partition(":")
    return f"{_encoded(name)}{colon}{_encoded(password)}"


def _encoded(text: str) -> str:
    """Return a text with everything percent-encoded that must be, and with what is encoded already as it is."""
    return "".join(
        part if re.fullmatch(_BYTE, part) else quote(part, safe="")
        for part in re.findall(rf"{_ENCODED}|.", text, re.DOTALL)
    )


def _encoded_path(path: str) -> str:
    return _encoded(path).replace(";", "%3B")


def _unescaped_in_path(path: str) -> set[str]:
    return _unescaped(path) | ({";"} & set(path))


def _unescaped(text: str) -> set[str]:
    """Return the characters that must be percent-encoded and are not, without those that all libraries accept."""
    found = {char for char in re.sub(_ENCODED, "", text) if not re.fullmatch(_BYTE, char)}
    return found - set(_UNAMBIGUOUS) or found


def _listed(chars: set[str]) -> str:
    """Name characters that must be written in another way, and the way; rare ones are not named."""
    named = [f"{_NAMES.get(char, char)} (write %{ord(char):02X})" for char in _NAMED if char in chars]
    others = [] if chars <= set(_NAMED) else ["special character (write % and its code)"]
    return "an unescaped " + " and ".join([*named, *others])


def _is_decodable(url: str) -> bool:
    try:
        unquote(url, errors="strict")
    except UnicodeDecodeError:
        return False
    return True


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True
