"""Validation of the URLs in settings and environment, stricter than that of any library.

Libraries disagree about malformed URLs. In ``amqp://user:12/secret@host`` some take ``user`` for the host and the
password for a path, and print both. So every URL is validated here first; all libraries read an accepted URL alike.
Source: https://www.rfc-editor.org/rfc/rfc3986#appendix-A
"""

import re
from ipaddress import IPv6Address
from urllib.parse import unquote

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


class UrlForm:
    """One form of URLs.

    Args:
        schemes: the allowed schemes, in lower case.
        user: ``NO_USER``, ``USER``, ``STRICT_USER``, ``USER_WITH_PASSWORD`` or ``SHARED_USER``.
        path: ``ONE_SEGMENT``, ``MANY_SEGMENTS``, ``NUMBER`` or ``SLASH``.
        has_options: whether there may be a query, ``name=value&name=value``.
    """

    def __init__(self, *schemes: str, user: str, path: str, has_options: bool = False) -> None:
        query = rf"(?:\?{_QUERY})?" if has_options else ""
        self._pattern = re.compile(
            rf"(?:{'|'.join(schemes)})://{user}(?P<host>{_HOST})(?::(?P<port>[0-9]{{1,5}}))?{path}{query}"
        )

    def check(self, text: str) -> str:
        """Return the URL with its scheme in lower case, which some libraries require.

        Raises:
            ValueError: the text is not a URL of this form. The error does not quote it, since it may hold a password.
        """
        scheme, separator, rest = text.partition("://")
        url = f"{scheme.lower()}{separator}{rest}"
        found = self._pattern.fullmatch(url)
        if found is None or not _is_decodable(url):
            raise ValueError("not a whole URL of this form")
        if found["port"] is not None and not 1 <= int(found["port"]) <= _MAX_PORT:
            raise ValueError("no port has this number")
        if found["host"].startswith("[") and not _is_ipv6(found["host"][1:-1]):
            raise ValueError("not an IPv6 address")
        return url


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
