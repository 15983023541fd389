"""The two authentication modes of OneNET, each one request header.

Source: https://open.iot.10086.cn/doc/ ("安全鉴权").
"""

import base64
import hmac
from collections.abc import Callable
from typing import Literal, Protocol
from urllib.parse import quote

from worker.core.credentials import AccessKey, ApiKey, Credentials, UserKey

_LIFETIME_S = 3600
_RENEW_BEFORE_S = 600  # far more than the clocks' difference and the duration of a request


class Authentication(Protocol):
    """Provides the header that authenticates a request."""

    def header(self) -> tuple[str, str]:
        """Return the header's name and value, valid for at least some minutes."""


class MasterKey:
    """Mode "common": the key itself is the header."""

    def __init__(self, credentials: ApiKey) -> None:
        self._header = ("api-key", credentials.api_key.get_secret_value())

    def header(self) -> tuple[str, str]:
        return self._header


class SignedToken:
    """Mode "safe": a token that is signed here and renewed before it expires.

    Args:
        credentials: the access key, and whose it is.
        version: the version of the token.
        clock: returns the Unix time in seconds; replaced in tests.
    """

    def __init__(self, credentials: AccessKey | UserKey, version: str, clock: Callable[[], float]) -> None:
        self._credentials = credentials
        self._version = version
        self._clock = clock
        self._expires_at = 0.0
        self._token = ""

    def header(self) -> tuple[str, str]:
        now = self._clock()
        # After the clock was set back, the token would be valid for longer than the platform may allow.
        if not _RENEW_BEFORE_S < self._expires_at - now <= _LIFETIME_S:
            self._expires_at = now + _LIFETIME_S
            self._token = sign(self._credentials, int(self._expires_at), self._version)
        return "Authorization", self._token


def sign(
    credentials: AccessKey | UserKey,
    expires_at: int,
    version: str,
    method: Literal["md5", "sha1", "sha256"] = "sha256",
) -> str:
    """Return a signed token.

    Args:
        credentials: the access key, and whose it is.
        expires_at: when the token expires, Unix time in seconds.
        version: the version of the token.
        method: the hash function of the signature.
    """
    key = base64.b64decode(credentials.access_key.get_secret_value())
    text = f"{expires_at}\n{method}\n{credentials.resource}\n{version}"  # not URL-encoded, unlike the header
    signature = base64.b64encode(hmac.digest(key, text.encode(), method)).decode()
    fields = {
        "version": version,
        "res": credentials.resource,
        "et": str(expires_at),
        "method": method,
        "sign": signature,
    }
    return "&".join(f"{name}={quote(value, safe='')}" for name, value in fields.items())


def authentication(credentials: Credentials, signing_version: str, clock: Callable[[], float]) -> Authentication:
    """Return the authentication for a product's credentials."""
    if isinstance(credentials, ApiKey):
        return MasterKey(credentials)
    return SignedToken(credentials, signing_version, clock)
