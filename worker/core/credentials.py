"""A OneNET product: where it is, and its credentials."""

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from worker.core.urls import MANY_SEGMENTS, NO_USER, UrlForm

ID_PATTERN = r"^[A-Za-z0-9_-]+$"  # of a product and of a user
Generation = Literal["v1", "v2"]
Api = Literal["auto", "v1", "v2"]
_PLATFORM = UrlForm(
    "http",
    "https",
    user=NO_USER,
    path=MANY_SEGMENTS,
    wanted="https://host, or http://host, with a path or without; no user, no query, no fragment",
)
_HEADER_VALUE = re.compile(r"[\x21-\x7e]+")
_STRICT = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ApiKey(BaseModel):
    """Credentials of mode "common", which only v1 of the platform has: the product's MasterKey."""

    model_config = _STRICT

    api_key: SecretStr = Field(min_length=1)

    @field_validator("api_key")
    @classmethod
    def _fits_a_header(cls, key: SecretStr) -> SecretStr:
        if not _HEADER_VALUE.fullmatch(key.get_secret_value()):
            raise ValueError("must be printable ASCII without blanks, since it travels in a header")
        return key


class _SigningKey(BaseModel):
    model_config = _STRICT

    access_key: SecretStr = Field(min_length=1)

    @field_validator("access_key")
    @classmethod
    def _is_base64(cls, key: SecretStr) -> SecretStr:
        try:
            base64.b64decode(key.get_secret_value(), validate=True)
        except binascii.Error as exc:
            raise ValueError("must be base64, as the platform shows it") from exc
        return key


class AccessKey(_SigningKey):
    """Credentials of mode "safe": tokens are signed with the product's access key."""

    product_id: str = Field(pattern=ID_PATTERN)

    @property
    def resource(self) -> str:
        """What the tokens give access to."""
        return f"products/{self.product_id}"


class UserKey(_SigningKey):
    """Credentials of a user, which only v2 of the platform has: tokens are signed with the user's access key."""

    user_id: str = Field(pattern=ID_PATTERN)

    @property
    def resource(self) -> str:
        """What the tokens give access to."""
        return f"userid/{self.user_id}"


Credentials = ApiKey | AccessKey | UserKey


@dataclass(frozen=True, slots=True)
class Product:
    """A product at the platform. ``url``: the platform's, without a trailing slash; ``api``: its generation."""

    url: str
    api: Generation
    credentials: Credentials


def platform_url(url: str) -> str:
    """Return the platform's URL without a trailing slash.

    Raises:
        ValueError: it is not the URL of a platform; the message does not quote it.
    """
    return _PLATFORM.check(url).rstrip("/")


def generation(api: Api, url: str) -> Generation:
    """Return the generation of the platform at a URL; ``auto``: v2 where the host begins with ``iot-api.``."""
    if api != "auto":
        return api
    return "v2" if (urlsplit(url).hostname or "").startswith("iot-api.") else "v1"


def plaintext_hosts(products: Mapping[str | None, Product]) -> list[str]:
    """Return the hosts to which credentials are sent in plaintext, each once."""
    hosts = (plaintext_host(product.url) for product in products.values())
    return sorted({host for host in hosts if host is not None})


def plaintext_host(url: str) -> str | None:
    """Return the host to which credentials are sent in plaintext; None with https or a loopback address."""
    parts = urlsplit(url)
    if parts.scheme == "https" or parts.hostname == "localhost":
        return None
    try:
        is_here = ip_address(parts.hostname or "").is_loopback
    except ValueError:
        is_here = False
    return None if is_here else parts.hostname
