"""Every setting of a running worker; no other module reads one.

Sources, first match wins: the file that ``NAME_FILE`` names (secrets only), the environment, ``.env``. Libraries read
variables of their own: ``HTTPS_PROXY`` and its kind (requests), ``OTEL_*`` (OpenTelemetry); the files that these
name are checked with the settings.
"""

import importlib.util
import os
import re
import ssl
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, Self, TypeVar
from zoneinfo import ZoneInfo

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from worker.amqp.address import BrokerAddress
from worker.amqp.topology import Topology
from worker.core.credentials import (
    ID_PATTERN,
    AccessKey,
    Api,
    ApiKey,
    Credentials,
    Product,
    UserKey,
    generation,
    platform_url,
)
from worker.core.rate import Rate
from worker.core.redis_address import RedisAddress
from worker.core.urls import (
    HOW_TO_WRITE,
    MANY_SEGMENTS,
    ONE_SEGMENT,
    STRICT_USER,
    USER_WITH_PASSWORD,
    UrlForm,
)
from worker.core.validation import messages, plain_values
from worker.errors import SettingsError
from worker.library_files import library_file_faults
from worker.products_file import read_products
from worker.setting_names import UnknownSetting, unknown_settings
from worker.settings_files import (
    MissingFile,
    UnusableFile,
    check_certificates,
    check_private_key,
    read_secret,
    read_text,
)

Some = TypeVar("Some", bound=BaseModel)

MEMORY = "memory://"
_OFF = "off"
_ENV_FILE = Path(".env")
_MAX_ENV_BYTES = 64 * 1024  # its library takes 150 bytes of memory for each of a quoted value (measured)
_SECRETS = ("amqp_url", "onenet_api_key", "onenet_access_key", "idempotency_url", "otel_exporter_otlp_endpoint")
_RENAMED = {
    "worker_settle": "worker_reconcile_delay",
    "worker_pause_after": "worker_pause_after_failures",
    "worker_pause_probe": "worker_probe_interval",
}
MAX_RETRY_DELAY_S = 24 * 3600
MAX_RETRY_DELAYS = 50  # each different one is a queue
_TEN_YEARS_S = 3650 * 24 * 3600
_AMQP = UrlForm(
    "amqp",
    "amqps",
    user=USER_WITH_PASSWORD,
    path=ONE_SEGMENT,
    wanted=f"amqp://user:password@host:port/vhost, or amqps://…; within user, password and vhost {HOW_TO_WRITE}",
    path_name="vhost",
    has_options=True,
)
_COLLECTOR = UrlForm(
    "http",
    "https",
    user=STRICT_USER,
    path=MANY_SEGMENTS,
    wanted=f"http://host:port or https://host:port; within user and password {HOW_TO_WRITE}",
    path_name="path",
)
_HTTP_HOST = re.compile(
    r"(?:[A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}|[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*(?:%[A-Za-z0-9._-]+)?"
)


def _check_authorities(path: Path) -> None:
    """Check that a file holds the certificates of authorities.

    Raises:
        UnusableFile: it does not, or cannot be read.
    """
    check_certificates(path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except (OSError, ssl.SSLError):
        raise UnusableFile("holds a certificate that cannot be read", path) from None


def _check_files(address: RedisAddress) -> None:
    """Check the files that the options of a Redis URL name.

    Raises:
        ValueError: one cannot be used.
    """
    authorities, certificate, key = map(address.options.get, ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"))
    checks = (
        ("ssl_ca_certs", authorities, _check_authorities),
        ("ssl_certfile", certificate, check_certificates),
        ("ssl_keyfile" if key else "ssl_certfile", key or certificate, check_private_key),
    )
    for name, path, check in checks:
        try:
            if path is not None:
                check(Path(str(path)))
        except UnusableFile as exc:
            raise ValueError(f"an option after ? cannot be used: {name}: {exc}") from exc
    if certificate is not None:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_cert_chain(str(certificate), str(key or certificate), password="")
        except (OSError, ssl.SSLError) as exc:
            raise ValueError("an option after ? cannot be used: ssl_certfile: does not belong to its key") from exc


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _split_secret(value: object) -> object:
    return _split(value.get_secret_value() if isinstance(value, SecretStr) else value)


def _broker_url(url: str, number: int, count: int) -> SecretStr:
    """Return one of the broker's URLs if it can be used.

    Raises:
        ValueError: it cannot; the message quotes nothing of it.
    """
    try:
        return SecretStr(_AMQP.check(url))
    except ValueError as exc:
        raise ValueError(f"URL {number} of {count} {exc}" if count > 1 else str(exc)) from None


def _check_store_url(url: SecretStr) -> SecretStr:
    text = url.get_secret_value()
    if text == MEMORY:
        return url
    _check_files(RedisAddress.parse(text))
    if importlib.util.find_spec("redis") is None:
        raise ValueError("Redis needs an extra: pip install 'onenet-execute-worker[redis]'")
    scheme, separator, rest = text.partition("://")
    return SecretStr(f"{scheme.lower()}{separator}{rest}")


StoreUrl = Annotated[SecretStr, AfterValidator(_check_store_url)]
CommaSeparated = BeforeValidator(_split)
AnyCase = BeforeValidator(_lower)


class _BrokerSettings(BaseModel):
    """Where the broker is, and with which certificates it is reached. They may change while a worker runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    amqp_url: Annotated[tuple[SecretStr, ...], BeforeValidator(_split_secret)] = Field(
        (SecretStr("amqp://guest:guest@localhost:5672/"),),
        description="URL of the broker, or of several nodes, separated by commas: the one that answers first is used; "
        "`amqps://` for TLS",
    )
    amqp_ca_file: Path | None = Field(None, description="CA certificates (PEM) that verify the broker")
    amqp_cert_file: Path | None = Field(None, description="client certificate (PEM)")
    amqp_key_file: Path | None = Field(None, description="private key of the client certificate (PEM)")

    @field_validator("amqp_url")
    @classmethod
    def _are_amqp_urls(cls, urls: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if not urls:
            raise ValueError("must be one URL or several, separated by commas: amqp://user:password@host:port/vhost")
        if len(urls) > 1 and not all("://" in url.get_secret_value() for url in urls):
            raise ValueError(
                "has a comma that is not between two URLs: within user, password and vhost write it as %2C"
            )
        return tuple(_broker_url(url.get_secret_value(), number, len(urls)) for number, url in enumerate(urls, start=1))

    @field_validator("amqp_ca_file")
    @classmethod
    def _holds_authorities(cls, path: Path | None) -> Path | None:
        if path is not None:
            _check_authorities(path)
        return path

    @field_validator("amqp_cert_file")
    @classmethod
    def _holds_a_certificate(cls, path: Path | None) -> Path | None:
        if path is not None:
            check_certificates(path)
        return path

    @field_validator("amqp_key_file")
    @classmethod
    def _holds_a_private_key(cls, path: Path | None) -> Path | None:
        if path is not None:
            check_private_key(path)
        return path

    @property
    def broker_address(self) -> BrokerAddress:
        """URLs and certificates of the broker."""
        return BrokerAddress(self.amqp_url, self.amqp_ca_file, self.amqp_cert_file, self.amqp_key_file)


class _StoreSettings(BaseModel):
    """Where the store is, which may change while a worker runs."""

    model_config = _BrokerSettings.model_config

    idempotency_url: StoreUrl = SecretStr(MEMORY)


class Settings(_BrokerSettings):
    """Everything a deployment may change. Built once, in the command line, then passed down."""

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
    onenet_products_file: Path | None = Field(
        None,
        description='JSON: product name → `{"api_key": …}`, `{"product_id": …, "access_key": …}` or '
        '`{"user_id": …, "access_key": …}`, each with `url` and `api` of its own where they differ',
    )
    onenet_connect_timeout: float = Field(3, ge=0.1, le=300, description="seconds to connect to the platform")
    onenet_read_timeout: float = Field(
        10, ge=0.1, le=300, description="seconds to wait for an answer; both timeouts together bound one whole request"
    )
    onenet_ca_file: Path | None = Field(None, description="CA certificates (PEM) that verify the platform")
    onenet_rate_limit: str = Field(
        "300/second",
        description="highest rate of requests of each product, reads of the history included; also `/minute`, `/hour`, "
        "`/day`; with Redis of all workers together; `off`: no limit",
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
    worker_retry_delays: Annotated[tuple[int, ...], CommaSeparated] = Field(
        (5, 30, 120, 600),
        min_length=1,
        description="seconds before each next attempt; the last repeats; at most 50, each from 1 to 86,400",
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
    worker_tenants: Annotated[Literal["trusted", "isolated"], AnyCase] = Field(
        "trusted",
        description="whether upstream systems trust each other; `isolated`: a command needs the AMQP property "
        "`user_id`, equal to `app_id`, and a `reply_to` that is the `app_id` or begins with it and a dot",
    )
    worker_results: Annotated[Literal["on", "off"], AnyCase] = Field(
        "off", description="whether to publish what became of each accepted command"
    )
    worker_result_delays: Annotated[tuple[int, ...], CommaSeparated] = Field(
        (60, 300, 900, 3600),
        min_length=1,
        description="seconds before each next look at the platform for a result; the last repeats; limits as above",
    )
    worker_pause_after_failures: int = Field(
        20, ge=1, le=100_000, description="consecutive failures of the platform after which a product is paused"
    )
    worker_probe_interval: float = Field(
        5,
        ge=0.01,
        le=3600,
        description="seconds between probes while paused; doubles after each failed probe, up to 60",
    )
    worker_shutdown_grace: float = Field(
        30, ge=0.1, le=3600, description="seconds for a shutdown to finish open commands"
    )
    idempotency_url: StoreUrl = Field(
        SecretStr(MEMORY),
        description="store of claims and outcomes: `memory://` for one worker; for several `redis://…`, `rediss://…` "
        "or `redis+sentinel://user:password@host:port,host:port/<master name>/<db>`",
    )
    idempotency_ttl: int = Field(604800, ge=1, le=_TEN_YEARS_S, description="seconds for which an outcome is kept")
    idempotency_wait_replicas: int = Field(
        0, ge=0, le=100, description="a claim and an outcome count only when so many replicas of Redis have them"
    )
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

    @field_validator("onenet_url")
    @classmethod
    def _is_http_url(cls, url: str) -> str:
        return platform_url(url)

    @field_validator("onenet_ca_file")
    @classmethod
    def _is_of_authorities(cls, path: Path | None) -> Path | None:
        if path is not None:
            _check_authorities(path)
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

    @field_validator("http_host")
    @classmethod
    def _is_a_host(cls, host: str) -> str:
        if not _HTTP_HOST.fullmatch(host):
            raise ValueError("must be an address or a host name, such as 127.0.0.1, 0.0.0.0 or ::")
        return host

    @field_validator("otel_exporter_otlp_endpoint")
    @classmethod
    def _takes_spans(cls, url: SecretStr | None) -> SecretStr | None:
        if url is None:
            return None
        text = _COLLECTOR.check(url.get_secret_value())
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

    @field_validator("worker_retry_delays", "worker_result_delays")
    @classmethod
    def _are_delays(cls, delays_s: tuple[int, ...]) -> tuple[int, ...]:
        if len(delays_s) > MAX_RETRY_DELAYS:
            raise ValueError(f"must be at most {MAX_RETRY_DELAYS} delays")
        if any(not 1 <= delay_s <= MAX_RETRY_DELAY_S for delay_s in delays_s):
            raise ValueError(f"each must be between 1 and {MAX_RETRY_DELAY_S} seconds")
        if list(delays_s) != sorted(delays_s):
            raise ValueError("must be in ascending order")
        return delays_s

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
        if self.idempotency_wait_replicas and self.idempotency_url.get_secret_value() == MEMORY:
            lines.append("IDEMPOTENCY_WAIT_REPLICAS: needs IDEMPOTENCY_URL=redis://…: memory:// has no replicas")
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
    def topology(self) -> Topology:
        """The exchanges and queues that the worker uses."""
        return Topology(self.worker_namespace, self.delay_queues_s, self.result_delays_s)

    @property
    def result_delays_s(self) -> tuple[int, ...]:
        """Seconds before each look for a result; none: results are off."""
        return self.worker_result_delays if self.worker_results == "on" else ()

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
    return _load(Settings, _RENAMED)


def find_unknown_settings() -> list[UnknownSetting]:
    """Return the names in the environment and in ``.env`` that look like settings and have no effect.

    What is wrong with ``.env`` itself is left to ``load_settings``.
    """
    names = {*Settings.model_fields, *(f"{name}_file" for name in _SECRETS), *_RENAMED}
    in_file, _ = _read_env_file()
    return unknown_settings(os.environ, in_file, {name.upper() for name in names})


def load_broker_address() -> BrokerAddress:
    """Read and check where the broker is by now; the other settings may be wrong.

    Raises:
        SettingsError: with one line per wrong setting.
    """
    return _load(_BrokerSettings).broker_address


def load_store_url() -> str:
    """Read and check where the store is by now; the other settings may be wrong.

    Raises:
        SettingsError: with one line per wrong setting.
    """
    return _load(_StoreSettings).idempotency_url.get_secret_value()


def _load(model: type[Some], renamed: Mapping[str, str] = MappingProxyType({})) -> Some:
    variables, lines = _read_variables()
    lines += library_file_faults(exports_spans="otel_exporter_otlp_endpoint" in variables)
    values = {name: variables[name] for name in model.model_fields if name in variables}
    files: dict[str, Path] = {}
    for name in _SECRETS:
        path = variables.get(f"{name}_file")
        if path is None or name not in model.model_fields:
            continue
        files[name] = Path(path)
        try:
            values[name] = read_secret(files[name])
        except UnusableFile as exc:
            lines.append(f"{name.upper()}_FILE: {exc}")
        if name in variables:
            lines.append(f"{name.upper()}_FILE: set, and {name.upper()} too: leave one of them out")
    for old, new in renamed.items():
        if old in variables:
            lines.append(f"{old.upper()}: was renamed; set {new.upper()} instead")
    try:
        settings = model.model_validate(values)
    except ValidationError as exc:  # not chained: it contains the input, which may be a secret
        lines += _lines(exc, files, are_complete=not lines)
    if lines:
        raise SettingsError(lines) from None
    return settings


def _read_variables() -> tuple[dict[str, str], list[str]]:
    """Return the variables that are set, by lower-case name, and a line for each error in ``.env``.

    The environment wins over ``.env``. An empty variable counts as not set: Compose files pass unset ones on as empty
    ones.
    """
    in_file, lines = _read_env_file()
    variables: dict[str, str] = {}
    for source in (in_file, os.environ):
        # In reverse order, so that NAME wins over name.
        variables |= {name.lower(): value for name, value in sorted(source.items(), reverse=True) if value}
    return variables, lines


def _read_env_file() -> tuple[dict[str, str | None], list[str]]:
    """Return the variables of ``.env``, none if it has errors, and a line for each error."""
    try:
        text = read_text(_ENV_FILE, _MAX_ENV_BYTES)
    except MissingFile:
        return {}, []
    except UnusableFile as exc:
        return {}, [f".env: {exc}"]
    lines: list[str] = []
    for fault in (binding.original for binding in parse_stream(StringIO(text)) if binding.error):
        blank = len(fault.string) - len(fault.string.lstrip())  # characters before the invalid text
        number = fault.line + fault.string.count("\n", 0, blank)
        lines.append(f".env: line {number}: must be NAME=value")
    return ({} if lines else dotenv_values(stream=StringIO(text))), lines  # which only logs the faults


def _lines(error: ValidationError, files: Mapping[str, Path], *, are_complete: bool) -> list[str]:
    """Return one line per wrong setting that names it. A value is left out where it may be a secret.

    Args:
        error: the result of the validation.
        files: those that settings were read from.
        are_complete: whether every setting that was made was read; what is wrong with several together may be due to
            one that was not.
    """
    found, values = messages(error), plain_values(error)
    together = found.pop("", "")
    lines = []
    for name, message in found.items():
        given = f", not {values[name]}" if name in values and name not in files else ""
        place = f" ({files[name]})" if name in files else ""
        lines.append(f"{name.upper()}: {_number_rule(name) or message}{given}{place}")
    return lines + (together.split("\n") if together and are_complete else [])


def _number_rule(name: str) -> str:
    """Return what a setting must be that is a number; empty for others."""
    setting = Settings.model_fields[name]
    low = [bound.ge for bound in setting.metadata if hasattr(bound, "ge")]
    high = [bound.le for bound in setting.metadata if hasattr(bound, "le")]
    if not (low and high):
        return ""
    kind = "whole number" if setting.annotation is int else "number"
    return f"must be a {kind} from {low[0]} to {high[0]}"


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
        found, faults = read_products(settings.onenet_products_file, settings.onenet_url, settings.onenet_api)
        if faults:
            raise SettingsError([f"ONENET_PRODUCTS_FILE: {fault}" for fault in faults])
        products.update(found)
    if not products:
        wanted = "ONENET_ACCESS_KEY with ONENET_PRODUCT_ID or ONENET_USER_ID"
        empty = "" if settings.onenet_products_file is None else ", which names no product"
        raise SettingsError([f"ONENET_API_KEY: not set, nor {wanted}, nor ONENET_PRODUCTS_FILE{empty}"])
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
