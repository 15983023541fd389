"""Every setting of a running worker; no other module reads one.

Sources, first match wins: the file that ``NAME_FILE`` names (secrets only), the environment, ``.env``. Libraries read
variables of their own: ``HTTPS_PROXY`` and its kind (requests), ``OTEL_*`` (OpenTelemetry).
"""

import importlib.util
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import (
    AfterValidator,
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
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from worker.amqp.address import BrokerAddress
from worker.amqp.topology import Topology
from worker.core.credentials import (
    ID_PATTERN,
    AccessKey,
    ApiKey,
    Credentials,
    Generation,
    Product,
    UserKey,
    generation,
)
from worker.core.rate import Rate
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
_OFF = "off"
_SECRETS = ("amqp_url", "onenet_api_key", "onenet_access_key", "idempotency_url")
_WHOLE_LINE = "whole_line"  # type of a validation error whose message names the setting itself
_RENAMED = {
    "worker_settle": "worker_reconcile_delay",
    "worker_pause_after": "worker_pause_after_failures",
    "worker_pause_probe": "worker_probe_interval",
}
MAX_RETRY_DELAY_S = 24 * 3600
_AMQP = UrlForm("amqp", "amqps", user=USER_WITH_PASSWORD, path=ONE_SEGMENT, has_options=True)
_REDIS = UrlForm("redis", "rediss", user=USER, path=NUMBER, has_options=True)
_ONENET = UrlForm("http", "https", user=NO_USER, path=MANY_SEGMENTS)
_COLLECTOR = UrlForm("http", "https", user=STRICT_USER, path=MANY_SEGMENTS)


def _checked(url: str, form: UrlForm, wanted: str) -> str:
    """Return the URL if it has that form.

    Raises:
        ValueError: it has not; the message names the expected form and quotes nothing of the URL.
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


def _platform_url(url: str) -> str:
    wanted = "https://host, or http://host, with a path or without; no user, no query, no fragment"
    return _checked(url, _ONENET, wanted).rstrip("/")


Api = Literal["auto", "v1", "v2"]
CommaSeparated = BeforeValidator(_split)
AnyCase = BeforeValidator(_lower)


@dataclass(frozen=True, slots=True)
class _Unusable:
    """Stands in for the value of a setting that a source cannot supply; validation reports its line."""

    line: str


def _from_files(variables: Mapping[str, str | None]) -> dict[str, str | _Unusable]:
    """Return the secrets that lie in files, and what is wrong with them and with names that settings no longer have.

    pydantic-settings' own ``secrets_dir`` takes a directory, not a ``NAME_FILE`` for each secret.

    Args:
        variables: the environment, by lower-case name.
    """
    found: dict[str, str | _Unusable] = {}
    for name in _SECRETS:
        path = variables.get(f"{name}_file")
        if path:
            found[name] = _read_secret(name, path, is_set=bool(variables.get(name)))
    for old, new in _RENAMED.items():
        if variables.get(old):
            found[new] = _Unusable(f"{old.upper()}: was renamed; set {new.upper()} instead")
    return found


def _read_secret(name: str, path: str, *, is_set: bool) -> str | _Unusable:
    variable = f"{name}_file".upper()
    if is_set:
        return _Unusable(f"{variable}: set, and {name.upper()} too: leave one of them out")
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as exc:
        return _Unusable(f"{variable}: cannot be read: {type(exc).__name__}")
    return text or _Unusable(f"{variable}: is empty")


class Settings(BaseSettings):
    """Everything a deployment may change. Built once, in the command line, then passed down."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_ignore_empty=True, hide_input_in_errors=True, env_file=".env"
    )

    amqp_url: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_secret)] = Field(
        (SecretStr("amqp://guest:guest@localhost:5672/"),),
        description="URL of the broker; several, separated by commas, are tried in turn; `amqps://` for TLS",
    )
    amqp_ca_file: FilePath | None = Field(None, description="CA certificates (PEM) that verify the broker")
    amqp_cert_file: FilePath | None = Field(None, description="client certificate (PEM)")
    amqp_key_file: FilePath | None = Field(None, description="private key of the client certificate (PEM)")
    amqp_declare: bool = Field(
        True, description="declare exchanges and queues on start; `false`: only check that they exist"
    )
    onenet_url: str = Field("https://api.heclouds.com", description="base URL of the platform")
    onenet_api: Annotated[Api, AnyCase] = Field(
        "auto",
        description="generation of the platform: `v1` (`/nbiot`, `errno`) or `v2` (`/nb-iot`, `code`); `auto`: v2 "
        "where the host of `ONENET_URL` begins with `iot-api.`, else v1",
    )
    onenet_api_key: SecretStr | None = Field(None, description='MasterKey of the product (mode "common"); v1 only')
    onenet_product_id: str | None = Field(
        None, pattern=ID_PATTERN, description='product that `ONENET_ACCESS_KEY` belongs to (mode "safe")'
    )
    onenet_user_id: str | None = Field(
        None, pattern=ID_PATTERN, description="user that `ONENET_ACCESS_KEY` belongs to instead of a product; v2 only"
    )
    onenet_access_key: SecretStr | None = Field(None, description='key that signs the tokens (mode "safe")')
    onenet_products_file: FilePath | None = Field(
        None,
        description='JSON: product name → `{"api_key": …}`, `{"product_id": …, "access_key": …}` or '
        '`{"user_id": …, "access_key": …}`, each with `url` and `api` of its own where they differ',
    )
    onenet_connect_timeout: float = Field(3, gt=0, le=300, description="seconds to connect to the platform")
    onenet_read_timeout: float = Field(
        10, gt=0, le=300, description="seconds to wait for an answer; both timeouts together bound one whole request"
    )
    onenet_ca_file: FilePath | None = Field(None, description="CA certificates (PEM) that verify the platform")
    onenet_rate_limit: str = Field(
        "300/second",
        description="highest rate of requests of each product, reads of the history included; also `/minute`, `/hour`; "
        "with Redis of all workers together; `off`: no limit",
    )
    onenet_device_interval: float = Field(
        1,
        ge=0,
        le=60,
        description="least seconds between two commands that one worker sends to one device, with any "
        "`WORKER_ORDERING`; 0: none",
    )
    onenet_timezone: str = Field("Asia/Shanghai", description="time zone in which the platform reads and writes times")
    worker_namespace: str = Field(
        "onenet", pattern=r"^[A-Za-z0-9._-]{1,100}$", description="prefix of every exchange and queue"
    )
    worker_concurrency: int = Field(32, ge=1, le=1000, description="concurrent requests")
    worker_retry_delays: Annotated[tuple[int, ...], NoDecode, CommaSeparated] = Field(
        (5, 30, 120, 600), min_length=1, description="seconds before each next attempt; the last repeats"
    )
    worker_max_attempts: int = Field(10, ge=1, le=1000, description="attempts after which a command fails")
    worker_reconcile_delay: int = Field(
        60,
        ge=1,
        le=MAX_RETRY_DELAY_S,
        description="seconds that a command in doubt waits before its device's history is read; at least "
        "`ONENET_CONNECT_TIMEOUT` and `ONENET_READ_TIMEOUT` together",
    )
    worker_in_doubt: Annotated[Literal["reconcile", "dead-letter", "resend"], AnyCase] = Field(
        "reconcile",
        description="what to do with a command that may have been cached: `reconcile` (read the history), "
        "`dead-letter`, or `resend`",
    )
    worker_ordering: Annotated[Literal["device", "none"], AnyCase] = Field(
        "device",
        description="`device`: send commands of one device one at a time, in order of arrival; `none`: no order, and "
        "all at once if `ONENET_DEVICE_INTERVAL` is 0",
    )
    worker_pause_after_failures: int = Field(
        20, ge=1, le=100_000, description="consecutive failures of the platform after which a product is paused"
    )
    worker_probe_interval: float = Field(
        5,
        gt=0,
        le=3600,
        description="seconds between probes while paused; doubles after each failed probe, up to 60",
    )
    worker_shutdown_grace: float = Field(
        30, gt=0, le=3600, description="seconds for a shutdown to finish open commands"
    )
    idempotency_url: SecretStr = Field(
        SecretStr(MEMORY),
        description="store of claims and outcomes: `memory://` for one worker, `redis://…` for several",
    )
    idempotency_ttl: int = Field(604800, ge=1, description="seconds for which an outcome is kept")
    http_host: str = Field("127.0.0.1", description="address to serve `/livez`, `/readyz` and `/metrics` on")
    http_port: int = Field(9108, ge=0, le=65535, description="port to serve them on; 0 turns them off")
    otel_exporter_otlp_endpoint: SecretStr | None = Field(
        None, description="collector of spans (OTLP over HTTP); needs the extra `otel`; other `OTEL_*` apply too"
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], AnyCase] = Field(
        "info", description="lowest level that is logged"
    )
    log_format: Annotated[Literal["json", "console"], AnyCase] | None = Field(
        None, description="`json` or `console`; default: `console` on a terminal, else `json`"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Add the source that reads ``NAME_FILE``; pydantic-settings calls this."""
        del file_secret_settings  # of `secrets_dir`, which is not used
        variables: dict[str, str | None] = {}
        for source in (dotenv_settings, env_settings):  # the environment wins
            if isinstance(source, EnvSettingsSource):
                variables |= source.env_vars
        files = InitSettingsSource(settings_cls, dict(_from_files(variables)))
        return init_settings, files, env_settings, dotenv_settings

    @field_validator("*", mode="before")
    @classmethod
    def _is_supplied(cls, value: object) -> object:
        if isinstance(value, _Unusable):
            raise PydanticCustomError(_WHOLE_LINE, "{line}", {"line": value.line})
        return value

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
        return _platform_url(url)

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
    def _is_a_rate(cls, text: str) -> str:
        if text.lower() != _OFF:
            try:
                Rate.parse(text)
            except ValueError as exc:
                raise ValueError(f"{exc}, or off") from exc
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
            raise ValueError("must be a time zone of the tz database, such as Asia/Shanghai") from exc
        return zone

    @field_validator("worker_retry_delays")
    @classmethod
    def _are_delays(cls, delays_s: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 1 <= delay_s <= MAX_RETRY_DELAY_S for delay_s in delays_s):
            raise ValueError(f"each must be between 1 and {MAX_RETRY_DELAY_S} seconds")
        if list(delays_s) != sorted(delays_s):
            raise ValueError("must be in ascending order")
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
        lines += self._wrong_credentials()
        if self.worker_reconcile_delay < self.request_s:
            lines.append(
                "WORKER_RECONCILE_DELAY: must be at least ONENET_CONNECT_TIMEOUT and ONENET_READ_TIMEOUT together, "
                f"{self.request_s:g} s: the history must not be read while the request may still be in flight"
            )
        if lines:
            raise ValueError("\n".join(lines))
        return self

    def _wrong_credentials(self) -> list[str]:
        """Return a line for each wrong combination of the settings of the credentials."""
        key = self.onenet_access_key
        owners = [
            name
            for name, value in (
                ("ONENET_PRODUCT_ID", self.onenet_product_id),
                ("ONENET_USER_ID", self.onenet_user_id),
            )
            if value is not None
        ]
        if len(owners) > 1:
            return ["ONENET_PRODUCT_ID, ONENET_USER_ID: set one of them, the owner of ONENET_ACCESS_KEY"]
        if bool(owners) != (key is not None):
            owner = owners[0] if owners else "ONENET_PRODUCT_ID or ONENET_USER_ID"
            return [f"{owner}, ONENET_ACCESS_KEY: set both or neither"]
        if self.onenet_api_key is not None and key is not None:
            return ['ONENET_API_KEY, ONENET_ACCESS_KEY: set one of them, for mode "common" or mode "safe"']
        api = generation(self.onenet_api, self.onenet_url)
        names = "and ONENET_API or ONENET_URL names"
        if self.onenet_api_key is not None and api == "v2":
            wanted = "set ONENET_PRODUCT_ID or ONENET_USER_ID, and ONENET_ACCESS_KEY"
            return [f"ONENET_API_KEY: is for v1 of the platform, {names} v2: {wanted}"]
        if self.onenet_user_id is not None and api == "v1":
            return [f"ONENET_USER_ID: is for v2 of the platform, {names} v1: set ONENET_PRODUCT_ID, or ONENET_API=v2"]
        return []

    @property
    def rate(self) -> Rate | None:
        """Highest rate of requests of each product; None: unlimited."""
        return None if self.onenet_rate_limit.lower() == _OFF else Rate.parse(self.onenet_rate_limit)

    @property
    def request_s(self) -> float:
        """Longest duration of one request to OneNET, in seconds."""
        return self.onenet_connect_timeout + self.onenet_read_timeout

    @property
    def delay_queues_s(self) -> tuple[int, ...]:
        """Delay of each delay queue, in seconds, ascending."""
        return tuple(sorted({*self.worker_retry_delays, self.worker_reconcile_delay}))

    @property
    def broker_address(self) -> BrokerAddress:
        """URLs and certificates of the broker."""
        return BrokerAddress(self.amqp_url, self.amqp_ca_file, self.amqp_cert_file, self.amqp_key_file)

    @property
    def topology(self) -> Topology:
        """The exchanges and queues that the worker uses."""
        return Topology(self.worker_namespace, self.delay_queues_s)

    @property
    def platform_zone(self) -> ZoneInfo:
        """Time zone in which OneNET reads and writes times."""
        return ZoneInfo(self.onenet_timezone)

    @property
    def prefetch(self) -> int:
        """Unacknowledged deliveries at once: a few more than requests, so that no request waits for the broker."""
        return self.worker_concurrency + max(2, self.worker_concurrency // 4)


def load_settings() -> Settings:
    """Read and check the settings, all of them.

    Raises:
        SettingsError: with one line per wrong setting.
    """
    try:
        return Settings()
    except ValidationError as exc:
        raise SettingsError(_lines(exc)) from None  # its cause contains the input, which may be a secret
    except (OSError, UnicodeDecodeError) as exc:  # of python-dotenv; no other source lets one pass
        raise SettingsError([f".env: cannot be read: {type(exc).__name__}"]) from exc


def load_products(settings: Settings) -> dict[str | None, Product]:
    """Return every product by name; that of commands without a product under ``None``.

    Raises:
        SettingsError: the products file is unusable, or no credentials are configured.
    """
    products: dict[str | None, Product] = {}
    credentials = _default_credentials(settings)
    if credentials is not None:
        api = generation(settings.onenet_api, settings.onenet_url)
        products[None] = Product(settings.onenet_url, api, credentials)
    if settings.onenet_products_file is not None:
        products.update(_read_products(settings.onenet_products_file, settings))
    if not products:
        wanted = "ONENET_ACCESS_KEY with ONENET_PRODUCT_ID or ONENET_USER_ID"
        raise SettingsError([f"ONENET_API_KEY: not set, nor {wanted}, nor ONENET_PRODUCTS_FILE"])
    return products


def _default_credentials(settings: Settings) -> Credentials | None:
    if settings.onenet_api_key is not None:
        return ApiKey(api_key=settings.onenet_api_key)
    if settings.onenet_access_key is None:
        return None
    if settings.onenet_user_id is not None:
        return UserKey(user_id=settings.onenet_user_id, access_key=settings.onenet_access_key)
    assert settings.onenet_product_id is not None  # checked with the settings
    return AccessKey(product_id=settings.onenet_product_id, access_key=settings.onenet_access_key)


def _read_products(path: Path, settings: Settings) -> dict[str | None, Product]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise SettingsError([f"ONENET_PRODUCTS_FILE: cannot be read as JSON: {type(exc).__name__}"]) from exc
    if not isinstance(found, dict):
        raise SettingsError(["ONENET_PRODUCTS_FILE: must be a JSON object: product name → credentials"])
    products: dict[str | None, Product] = {}
    lines: list[str] = []
    for name, entry in found.items():
        try:
            products[name] = _read_product(entry, settings)
        except ValidationError as exc:
            lines += [f"ONENET_PRODUCTS_FILE: product {name}: {line}" for line in _lines(exc)]
        except ValueError as exc:
            lines.append(f"ONENET_PRODUCTS_FILE: product {name}: {exc}")
    if lines:
        raise SettingsError(lines)
    return products


class _Place(BaseModel):
    """Where a product of the products file is; by default where ``ONENET_URL`` and ``ONENET_API`` say."""

    model_config = ConfigDict(hide_input_in_errors=True)

    url: Annotated[str, AfterValidator(_platform_url)]
    api: Annotated[Api, AnyCase]


def _read_product(entry: object, settings: Settings) -> Product:
    """Return a product of the products file.

    Raises:
        ValueError: the entry is unusable; pydantic's ValidationError is one.
    """
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    place = _Place.model_validate({"url": settings.onenet_url, "api": settings.onenet_api} | fields)
    kinds: dict[str, type[Credentials]] = {"api_key": ApiKey, "product_id": AccessKey, "user_id": UserKey}
    named = [name for name in kinds if name in fields]
    if len(named) != 1:
        raise ValueError("must be an object with one of api_key, product_id and user_id")
    [kind] = named
    credentials = kinds[kind].model_validate({key: fields[key] for key in fields.keys() - _Place.model_fields.keys()})
    api: Generation = generation(place.api, place.url)
    if kind == "api_key" and api == "v2":
        raise ValueError("api_key: is for v1 of the platform; v2 needs product_id or user_id, and access_key")
    if kind == "user_id" and api == "v1":
        raise ValueError('user_id: is for v2 of the platform; use product_id, or set "api": "v2"')
    return Product(place.url, api, credentials)


def _lines(error: ValidationError) -> list[str]:
    """Return one line per wrong setting that names it. Values are left out: they may be secrets."""
    lines: dict[str, str] = {}
    for item in error.errors(include_input=False, include_url=False, include_context=False):
        message = item["msg"].removeprefix("Value error, ")
        name = ".".join(str(part) for part in item["loc"][:1]).upper()
        line = f"{name}: {message}" if name and item["type"] != _WHOLE_LINE else message
        lines.setdefault(name, line)  # a list may be wrong at several places
    return [line for text in lines.values() for line in text.split("\n")]
