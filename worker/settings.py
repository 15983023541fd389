"""Every setting of a deployment: the worker reads the environment nowhere else.

Read from the environment, then from ``.env``; a secret also from the file that ``NAME_FILE`` names.
"""

import base64
import binascii
import importlib.util
import json
import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from dotenv import dotenv_values
from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FilePath,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from worker.core.urls import (
    HOW_TO_WRITE,
    MANY_SEGMENTS,
    NO_USER,
    NUMBER,
    ONE_SEGMENT,
    STRICT_USER,
    USER,
    USER_WITH_PASSWORD,
    UrlForm,
)
from worker.errors import SettingsError

MEMORY = "memory://"
MAX_RETRY_DELAY_S = 24 * 3600
PRODUCT_ID_PATTERN = r"^[A-Za-z0-9_-]+$"
_RATE = re.compile(r"([1-9][0-9]{0,6})\s*/\s*(second|minute|hour|day)", re.IGNORECASE)
_PERIODS_S = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}
_AMQP = UrlForm("amqp", "amqps", user=USER_WITH_PASSWORD, path=ONE_SEGMENT, has_options=True)
_REDIS = UrlForm("redis", "rediss", user=USER, path=NUMBER, has_options=True)
_ONENET = UrlForm("http", "https", user=NO_USER, path=MANY_SEGMENTS)
_COLLECTOR = UrlForm("http", "https", user=STRICT_USER, path=MANY_SEGMENTS)


class ApiKey(BaseModel):
    """Credentials of mode "common": the product's MasterKey."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    api_key: SecretStr = Field(min_length=1)

    @field_validator("api_key")
    @classmethod
    def _fits_a_header(cls, key: SecretStr) -> SecretStr:
        if not re.fullmatch(r"[\x21-\x7e]+", key.get_secret_value()):
            raise ValueError("must be printable ASCII without blanks, since it travels in a header")
        return key


class AccessKey(BaseModel):
    """Credentials of mode "safe": tokens are signed with the access key."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    product_id: str = Field(pattern=PRODUCT_ID_PATTERN)
    access_key: SecretStr = Field(min_length=1)

    @field_validator("access_key")
    @classmethod
    def _is_base64(cls, key: SecretStr) -> SecretStr:
        try:
            base64.b64decode(key.get_secret_value(), validate=True)
        except binascii.Error as exc:
            raise ValueError("must be base64, as the platform shows it") from exc
        return key


Credentials = ApiKey | AccessKey


@dataclass(frozen=True, slots=True)
class Rate:
    """So many requests in so many seconds."""

    count: int
    period_s: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``200/second``.

        Raises:
            ValueError: it is not such a text.
        """
        found = _RATE.fullmatch(text)
        if found is None:
            raise ValueError("must be a count and a unit, such as 200/second, 1000/minute or 5000/hour")
        return cls(int(found[1]), _PERIODS_S[found[2].lower()])


def _checked(url: str, form: UrlForm, wanted: str) -> str:
    """Return a URL of that form.

    Raises:
        ValueError: it is not of that form; the error says what is wanted, and nothing of the URL.
    """
    try:
        return form.check(url)
    except ValueError:
        raise ValueError(f"must be {wanted}") from None


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _split_secret(value: object) -> object:
    return _split(value.get_secret_value() if isinstance(value, SecretStr) else value)


CommaSeparated = BeforeValidator(_split)
AnyCase = BeforeValidator(_lower)


class Settings(BaseSettings):
    """Everything a deployment may change. Built once, in the command line, then passed down."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_ignore_empty=True, hide_input_in_errors=True, env_file=".env"
    )

    amqp_url: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_secret)] = Field(
        (SecretStr("amqp://guest:guest@localhost:5672/"),),
        description="the broker; several, comma-separated, are tried in turn; `amqps://` for TLS",
    )
    amqp_ca_file: FilePath | None = Field(None, description="the authority that signed the broker's certificate")
    amqp_cert_file: FilePath | None = Field(None, description="the worker's own certificate")
    amqp_key_file: FilePath | None = Field(None, description="the key of the worker's own certificate")
    amqp_declare: bool = Field(True, description="declare the topology on start; `false`: only check that it is there")
    onenet_url: str = Field("https://api.heclouds.com", description="the platform's base URL")
    onenet_api_key: SecretStr | None = Field(None, description='the product\'s MasterKey: mode "common"')
    onenet_product_id: str | None = Field(
        None, pattern=PRODUCT_ID_PATTERN, description='the product of `ONENET_ACCESS_KEY`: mode "safe"'
    )
    onenet_access_key: SecretStr | None = Field(None, description='signs the tokens of mode "safe"')
    onenet_products_file: FilePath | None = Field(
        None,
        description='JSON: product name → `{"api_key": …}` or `{"product_id": …, "access_key": …}`',
    )
    onenet_connect_timeout: float = Field(3, gt=0, le=300, description="seconds")
    onenet_read_timeout: float = Field(
        10, gt=0, le=300, description="seconds; with the one above it bounds one whole request"
    )
    onenet_ca_file: FilePath | None = Field(None, description="the authority that signed the platform's certificate")
    onenet_rate_limit: str | None = Field(
        None,
        description="the most commands that are sent for each product, such as `200/second`; also `/minute`, `/hour`",
    )
    onenet_timezone: str = Field("Asia/Shanghai", description="the platform's time zone")
    worker_namespace: str = Field(
        "onenet", pattern=r"^[A-Za-z0-9._-]{1,100}$", description="begins the name of every exchange and queue"
    )
    worker_concurrency: int = Field(32, ge=1, le=1000, description="requests under way at once")
    worker_retry_delays: Annotated[tuple[int, ...], NoDecode, CommaSeparated] = Field(
        (5, 30, 120, 600), min_length=1, description="seconds before each next attempt; the last repeats"
    )
    worker_max_attempts: int = Field(10, ge=1, le=1000, description="attempts before a command is given up")
    worker_settle: int = Field(
        60,
        ge=1,
        le=MAX_RETRY_DELAY_S,
        validation_alias=AliasChoices("worker_settle", "worker_reconcile_delay"),
        description="seconds that a command in doubt rests before its device's history is read; not less than the two "
        "timeouts together; also `WORKER_RECONCILE_DELAY`, which is to be its only name",
    )
    worker_in_doubt: Annotated[Literal["reconcile", "dead-letter", "resend"], AnyCase] = Field(
        "reconcile",
        description="`reconcile`, `dead-letter` or `resend`: what becomes of a command that may have been cached",
    )
    worker_ordering: Annotated[Literal["device", "none"], AnyCase] = Field(
        "device", description="`device`: commands of one device are sent one at a time, in order of arrival; or `none`"
    )
    worker_pause_after: int = Field(
        20,
        ge=1,
        le=100_000,
        validation_alias=AliasChoices("worker_pause_after", "worker_pause_after_failures"),
        description="failures of the platform in a row, after which nothing more is sent; also "
        "`WORKER_PAUSE_AFTER_FAILURES`, which is to be its only name",
    )
    worker_pause_probe: float = Field(
        5,
        gt=0,
        le=3600,
        validation_alias=AliasChoices("worker_pause_probe", "worker_probe_interval"),
        description="seconds until one command is tried then; each that fails doubles them, up to 60; also "
        "`WORKER_PROBE_INTERVAL`, which is to be its only name",
    )
    worker_shutdown_grace: float = Field(30, gt=0, le=3600, description="seconds to finish what is under way")
    idempotency_url: SecretStr = Field(
        SecretStr(MEMORY),
        description="where commands are remembered: `memory://` for one worker, `redis://…` for several",
    )
    idempotency_ttl: int = Field(604800, ge=1, description="seconds for which an outcome is remembered")
    http_host: str = Field("127.0.0.1", description="address of `/livez`, `/readyz` and `/metrics`")
    http_port: int = Field(9108, ge=0, le=65535, description="their port; 0 turns them off")
    otel_exporter_otlp_endpoint: SecretStr | None = Field(
        None, description="where spans are sent, OTLP over HTTP; needs the extra `otel`; other `OTEL_*` hold as well"
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], AnyCase] = Field(
        "info", description="the least that is logged"
    )
    log_format: Annotated[Literal["json", "console"], AnyCase] | None = Field(
        None, description="`json`, or `console`; by itself `console` on a terminal, else `json`"
    )

    @field_validator("amqp_url")
    @classmethod
    def _are_amqp_urls(cls, urls: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        wanted = "amqp://user:password@host:port/vhost, or amqps://…; within user, password and vhost " + HOW_TO_WRITE
        if not urls:
            raise ValueError(f"must be {wanted}")
        return tuple(SecretStr(_checked(url.get_secret_value(), _AMQP, wanted)) for url in urls)

    @field_validator("onenet_url")
    @classmethod
    def _is_http_url(cls, url: str) -> str:
        wanted = "https://host, or http://host, with a path or without; no user, no query, no fragment"
        return _checked(url, _ONENET, wanted).rstrip("/")

    @field_validator("amqp_ca_file", "onenet_ca_file")
    @classmethod
    def _holds_certificates(cls, path: Path | None) -> Path | None:
        if path is not None:
            try:
                ssl.create_default_context(cafile=str(path))
            except (OSError, ssl.SSLError) as exc:
                raise ValueError("holds no certificate in PEM form") from exc
        return path

    @field_validator("onenet_rate_limit")
    @classmethod
    def _is_a_rate(cls, text: str | None) -> str | None:
        if text is None:
            return None
        Rate.parse(text)
        if importlib.util.find_spec("throttled") is None:
            raise ValueError("a rate needs an extra: pip install 'onenet-execute-worker[rate]'")
        return text

    @field_validator("otel_exporter_otlp_endpoint")
    @classmethod
    def _takes_spans(cls, url: SecretStr | None) -> SecretStr | None:
        if url is None:
            return None
        wanted = f"http://host:port or https://host:port; within user and password {HOW_TO_WRITE}"
        text = _checked(url.get_secret_value(), _COLLECTOR, wanted)
        if importlib.util.find_spec("opentelemetry") is None:
            raise ValueError("tracing needs an extra: pip install 'onenet-execute-worker[otel]'")
        return SecretStr(text.rstrip("/"))

    @field_validator("onenet_timezone")
    @classmethod
    def _is_known(cls, zone: str) -> str:
        try:
            ZoneInfo(zone)
        except (KeyError, ValueError, OSError) as exc:
            raise ValueError("is no time zone of the tz database, such as Asia/Shanghai") from exc
        return zone

    @field_validator("worker_retry_delays")
    @classmethod
    def _are_delays(cls, delays_s: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 1 <= delay_s <= MAX_RETRY_DELAY_S for delay_s in delays_s):
            raise ValueError(f"each must be between 1 and {MAX_RETRY_DELAY_S} seconds")
        if list(delays_s) != sorted(delays_s):
            raise ValueError("must not become shorter")
        return delays_s

    @field_validator("idempotency_url")
    @classmethod
    def _is_a_store(cls, url: SecretStr) -> SecretStr:
        text = url.get_secret_value()
        if text == MEMORY:
            return url
        wanted = "memory://, redis://user:password@host:port/number or rediss://…; within user and password "
        text = _checked(text, _REDIS, wanted + HOW_TO_WRITE)
        if importlib.util.find_spec("redis") is None:
            raise ValueError("Redis needs an extra: pip install 'onenet-execute-worker[redis]'")
        return SecretStr(text)

    @field_validator("onenet_access_key")
    @classmethod
    def _signs(cls, key: SecretStr | None) -> SecretStr | None:
        return key if key is None else AccessKey(product_id="x", access_key=key).access_key

    @field_validator("onenet_api_key")
    @classmethod
    def _authenticates(cls, key: SecretStr | None) -> SecretStr | None:
        return key if key is None else ApiKey(api_key=key).api_key

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        lines = []
        if (self.amqp_cert_file is None) != (self.amqp_key_file is None):
            lines.append("AMQP_CERT_FILE, AMQP_KEY_FILE: set both or neither")
        if (self.onenet_product_id is None) != (self.onenet_access_key is None):
            lines.append("ONENET_PRODUCT_ID, ONENET_ACCESS_KEY: set both or neither")
        if self.onenet_api_key is not None and self.onenet_access_key is not None:
            lines.append('ONENET_API_KEY, ONENET_ACCESS_KEY: set one of them, for mode "common" or mode "safe"')
        if self.worker_settle < self.request_s:
            lines.append(
                "WORKER_SETTLE: must not be less than ONENET_CONNECT_TIMEOUT and ONENET_READ_TIMEOUT together, "
                f"{self.request_s:g}: a request may be under way for so long"
            )
        if lines:
            raise ValueError("\n".join(lines))
        return self

    @property
    def readable_at(self) -> str | None:
        """The host to which keys travel readable for whoever is on the way: none with https, or on this machine."""
        parts = urlsplit(self.onenet_url)
        if parts.scheme == "https" or parts.hostname == "localhost":
            return None
        try:
            is_here = ip_address(parts.hostname or "").is_loopback
        except ValueError:
            is_here = False
        return None if is_here else parts.hostname

    @property
    def rate(self) -> Rate | None:
        """The most that is sent for each product."""
        return None if self.onenet_rate_limit is None else Rate.parse(self.onenet_rate_limit)

    @property
    def request_s(self) -> float:
        """The longest that one request to OneNET may take, in seconds."""
        return self.onenet_connect_timeout + self.onenet_read_timeout

    @property
    def delay_queues_s(self) -> tuple[int, ...]:
        """The seconds of every delay queue, ascending."""
        return tuple(sorted({*self.worker_retry_delays, self.worker_settle}))

    @property
    def platform_zone(self) -> ZoneInfo:
        """The zone in which OneNET reads and writes times."""
        return ZoneInfo(self.onenet_timezone)

    @property
    def prefetch(self) -> int:
        """Deliveries held unacknowledged: a little above the concurrency, so that no thread waits for the broker."""
        return self.worker_concurrency + max(2, self.worker_concurrency // 4)


_SECRETS = ("AMQP_URL", "ONENET_API_KEY", "ONENET_ACCESS_KEY", "IDEMPOTENCY_URL")


def load_settings() -> Settings:
    """Read and check the settings, all of them.

    Raises:
        SettingsError: with one line per wrong setting.
    """
    try:
        env = {**dotenv_values(".env"), **os.environ}
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError([f".env: cannot be read: {type(exc).__name__}"]) from exc
    secrets, lines = _secrets_from_files({name.upper(): value for name, value in env.items() if value})
    try:
        settings = Settings.model_validate(secrets)
    except ValidationError as exc:
        lines += _lines(exc)
    if lines:
        raise SettingsError(lines)
    return settings


def load_products(settings: Settings) -> dict[str | None, Credentials]:
    """Return the credentials of every configured product; under ``None`` those of commands that name none.

    Raises:
        SettingsError: the products file is unusable, or there are no credentials at all.
    """
    products: dict[str | None, Credentials] = {}
    if settings.onenet_api_key is not None:
        products[None] = ApiKey(api_key=settings.onenet_api_key)
    elif settings.onenet_product_id is not None and settings.onenet_access_key is not None:
        products[None] = AccessKey(product_id=settings.onenet_product_id, access_key=settings.onenet_access_key)
    if settings.onenet_products_file is not None:
        products.update(_read_products(settings.onenet_products_file))
    if not products:
        raise SettingsError(
            ["ONENET_API_KEY: not set, nor ONENET_PRODUCT_ID with ONENET_ACCESS_KEY, nor ONENET_PRODUCTS_FILE"]
        )
    return products


def _read_products(path: Path) -> dict[str | None, Credentials]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise SettingsError([f"ONENET_PRODUCTS_FILE: cannot be read as JSON: {type(exc).__name__}"]) from exc
    if not isinstance(found, dict):
        raise SettingsError(["ONENET_PRODUCTS_FILE: must be a JSON object: product name → credentials"])
    products: dict[str | None, Credentials] = {}
    lines: list[str] = []
    for name, value in found.items():
        kind = ApiKey if isinstance(value, dict) and "api_key" in value else AccessKey
        try:
            products[name] = kind.model_validate(value)
        except ValidationError as exc:
            lines += [f"ONENET_PRODUCTS_FILE: product {name}: {line}" for line in _lines(exc)]
    if lines:
        raise SettingsError(lines)
    return products


def _secrets_from_files(env: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Read every ``NAME_FILE`` of a secret: the values by field name, and a line for each that cannot be had."""
    found: dict[str, str] = {}
    lines: list[str] = []
    for name in _SECRETS:
        path = env.get(f"{name}_FILE")
        if path is None:
            continue
        if name in env:
            lines.append(f"{name}_FILE: set, and {name} too: leave one of them out")
            continue
        try:
            found[name.lower()] = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as exc:
            lines.append(f"{name}_FILE: cannot be read: {type(exc).__name__}")
        else:
            if not found[name.lower()]:
                lines.append(f"{name}_FILE: is empty")
                del found[name.lower()]
    return found, lines


def _lines(error: ValidationError) -> list[str]:
    """Say each error in one line that names the setting; the values, which may be secrets, stay out."""
    lines: dict[str, str] = {}
    for item in error.errors(include_input=False, include_url=False, include_context=False):
        message = item["msg"].removeprefix("Value error, ")
        name = ".".join(str(part) for part in item["loc"][:1]).upper()
        lines.setdefault(name, f"{name}: {message}" if name else message)  # a list may be wrong in several places
    return [line for text in lines.values() for line in text.split("\n")]
