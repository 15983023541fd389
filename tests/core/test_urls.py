"""URLs: accepted only if every library reads them alike, else refused in one line that does not quote them."""

import asyncio
from pathlib import Path
from urllib.parse import quote

import pytest
import redis
import requests
from urllib3.util import parse_url

from worker.amqp.connection import connection_parameters, printable_address
from worker.app import store_of
from worker.core.redis_address import RedisAddress
from worker.errors import SettingsError
from worker.settings import Settings, load_settings

SECRET = "S3cret"
ODD = "~!$&'()*+,;=:-._ /?#[]@%\"<>\\^`{|}\u5bc6\u7801"  # every kind of character, encoded where necessary


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of the machine and no .env of the checkout has an effect."""
    monkeypatch.chdir(tmp_path)
    names = [name.upper() for name in Settings.model_fields]
    for name in (
        *names,
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "no_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("url", "user", "password", "host", "port", "vhost", "printed"),
    [
        ("amqp://host", "guest", "guest", "host", 5672, "/", "amqp://host:5672"),
        ("amqp://host/", "guest", "guest", "host", 5672, "/", "amqp://host:5672"),
        ("amqps://a:b@host", "a", "b", "host", 5671, "/", "amqps://host:5671"),
        ("AMQP://a:b@HOST.example./v", "a", "b", "host.example.", 5672, "v", "amqp://host.example.:5672"),
        ("amqp://a:b@192.0.2.1:1/%2F", "a", "b", "192.0.2.1", 1, "/", "amqp://192.0.2.1:1"),
        ("amqp://a:b@[2001:DB8::1]:65535/v", "a", "b", "2001:db8::1", 65535, "v", "amqp://[2001:db8::1]:65535"),
        ("amqp://a:b@my_host/%2Fmy%2fvhost", "a", "b", "my_host", 5672, "/my/vhost",
         "amqp://my_host:5672"),
        ("amqp://a:@host/v?heartbeat=7", "a", "", "host", 5672, "v", "amqp://host:5672"),
        ("amqp://:b@host", "", "b", "host", 5672, "/", "amqp://host:5672"),
        ('amqp://a^{}|`"<>:b^{}|`"<>@host', 'a^{}|`"<>', 'b^{}|`"<>', "host", 5672, "/", "amqp://host:5672"),
        ("amqp://a:b:c@host", "a", "b:c", "host", 5672, "/", "amqp://host:5672"),
        ("amqp://a:12%2FS3cret@host", "a", "12/S3cret", "host", 5672, "/", "amqp://host:5672"),
        (f"amqp://{quote(ODD, safe='')}:{quote(ODD, safe='')}@host/{quote(ODD, safe='')}", ODD, ODD, "host", 5672, ODD,
         "amqp://host:5672"),
        ("amqp://a~!$&'()*+;=._-:p~!$&'()*+;=._-:@host/v~!$&'()*+=:.", "a~!$&'()*+;=._-", "p~!$&'()*+;=._-:", "host",
         5672, "v~!$&'()*+=:.", "amqp://host:5672"),
    ],
)  # fmt: skip
def test_an_amqp_url_means_the_same_to_pika_as_to_the_worker(
    url: str, user: str, password: str, host: str, port: int, vhost: str, printed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMQP_URL", url)
    [found] = connection_parameters(load_settings().broker_address)
    assert vars(found.credentials).items() >= {("username", user), ("password", password)}
    assert (found.host, found.port, found.virtual_host) == (host, port, vhost)
    assert printable_address(found) == printed


def test_the_options_of_an_amqp_url_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "AMQP_URL", "amqp://host?heartbeat=7&frame_max=8192&tcp_options={'TCP_KEEPIDLE':60}&channel_max=5"
    )
    [found] = connection_parameters(load_settings().broker_address)
    assert (found.heartbeat, found.frame_max, found.channel_max) == (7, 8192, 5)
    assert found.tcp_options == {"TCP_KEEPIDLE": 60}


@pytest.mark.parametrize(
    ("url", "user", "password", "host", "port", "number"),
    [
        ("redis://host", None, None, "host", None, None),
        ("redis://host/", None, None, "host", None, None),
        ("redis://:S3cret@host:1/15", None, "S3cret", "host", 1, 15),
        ("rediss://a:b@[2001:db8::1]/0", "a", "b", "2001:db8::1", None, 0),
        ("REDIS://a@host", "a", None, "host", None, None),
        ("redis://a:b@host/1?socket_timeout=3&health_check_interval=5", "a", "b", "host", None, 1),
        (f"redis://{quote(ODD, safe='')}:{quote(ODD, safe='')}@host", ODD, ODD, "host", None, None),
        ('redis://a^{}|`"<>:b^{}|`"<>@host', 'a^{}|`"<>', 'b^{}|`"<>', "host", None, None),
        ("redis://:a,b;c=d:e@host", None, "a,b;c=d:e", "host", None, None),
    ],
)
def test_a_redis_url_means_the_same_to_redis_py_as_to_the_worker(
    url: str,
    user: str | None,
    password: str | None,
    host: str,
    port: int | None,
    number: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IDEMPOTENCY_URL", url)
    settings = load_settings()
    pool = redis.ConnectionPool.from_url(settings.idempotency_url.get_secret_value())
    found = pool.connection_kwargs
    assert (found.get("username"), found.get("password")) == (user, password)
    assert (found.get("host"), found.get("port"), found.get("db")) == (host, port, number)
    asyncio.run(store_of(settings).close())


@pytest.mark.parametrize(
    ("url", "host", "port", "path"),
    [
        ("https://api.heclouds.com", "api.heclouds.com", None, None),
        ("HTTP://Gateway:8580/", "gateway", 8580, None),
        ("http://[::1]:8580/a/b%20c/", "[::1]", 8580, "/a/b%20c"),
    ],
)
def test_a_platform_url_means_the_same_to_urllib3_as_to_the_worker(
    url: str, host: str, port: int | None, path: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONENET_URL", url)
    found = parse_url(load_settings().onenet_url)
    assert (found.host, found.port, found.path, found.auth) == (host, port, path, None)


def test_a_collector_url_may_have_a_user_and_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "https://a:S3cret%2F@collector:4318/otlp/")
    settings = load_settings()
    assert SECRET not in repr(settings) + settings.model_dump_json()
    assert settings.otel_exporter_otlp_endpoint is not None
    sent = requests.Request("POST", f"{settings.otel_exporter_otlp_endpoint.get_secret_value()}/v1/traces").prepare()
    assert sent.url == "https://a:S3cret%2F@collector:4318/otlp/v1/traces"
    assert sent.headers["Authorization"] == "Basic YTpTM2NyZXQv"  # a:S3cret/


MALFORMED = [  # parts after :// with a password, which no setting accepts
    "svc:/S3cret@host:5672/prod", "svc:12/S3cret@host:5672/prod", "svc:S3cret/w@host", "svc:12/S3cret@host/1",
    "svc:12/S3cret@host", "svc:12?S3cret@host", "svc:12?heartbeat=1&S3cret@host/", "svc:12?heartbeat=S3cret@host/",
    "svc:12#S3cret@host", "svc:S3cret#1@host", "svc:S3cret@1@host", "svc:S3cret@@host/", "svc:S3cret%@host/",
    "svc:S3cret%4@host", "svc:S3cret%zz@host", "svc:S3cret%FF@host", "svc:S3cret%00@host", "svc:S3cret\\@host",
    "svc:S3cret[@host", "svc:S3cret]@host", "svc:S3cret\u5bc6@host", "svc:S3cret @host", "svc:S3cret\t@host",
    "svc:S3cret@host\n/", "svc:S3cret@host\x7f", "svc:S3cret\r\n@host", "svc:S3cret@", "svc:S3cret@/1", "svc:S3cret",
    "svc:S3cret@host:", "svc:S3cret@host:0", "svc:S3cret@host:65536", "svc:S3cret@host:+1", "svc:S3cret@host:1_0",
    "svc:S3cret@host:\u0661", "svc:S3cret@host:5672x", "svc:S3cret@-host", "svc:S3cret@a..b", "svc:S3cret@ho%73t",
    "svc:S3cret@h\u00f6st", "svc:S3cret@[::1", "svc:S3cret@::1", "svc:S3cret@[192.0.2.1]", "svc:S3cret@[::1]x",
    "svc:S3cret@[:::1]", "svc:S3cret@host:5672:5672", "svc:S3cret@" + "a" * 64, "svc:S3cret@host#",
    "svc:S3cret@host/1#x", "svc:S3cret@host/1?x", "svc:S3cret@host/1?=x", "svc:S3cret@host/1?x=",
    "svc:S3cret@host/1?x=%", "svc:S3cret@host/1?x=1&", "svc:S3cret@host/1 2", "svc:S3cret@host/%",
    "svc:S3cret@host/%FF", "svc:S3cret@host/\u5bc6",
]  # fmt: skip
SCHEMES = {"AMQP_URL": "amqp", "IDEMPOTENCY_URL": "redis", "ONENET_URL": "http", "OTEL_EXPORTER_OTLP_ENDPOINT": "http"}
OF_ONE_SETTING = [
    ("AMQP_URL", "amqp://S3cret@host/"), ("AMQP_URL", "amqp://svc:S3cret@host//my/vhost"),
    ("AMQP_URL", "amqp://svc:S3cret@host/my/vhost"), ("AMQP_URL", "amqp://svc:S3cret@host/prod/"),
    ("AMQP_URL", "amqp://svc:S3cret@host//"), ("AMQP_URL", "amqp://svc:S3cret@host/a;b"),
    ("AMQP_URL", "amqp://svc:S3cret@host/a@b"), ("AMQP_URL", "amqp://svc:S3cret@host/" + "v" * 256),
    ("AMQP_URL", "amqp://svc:S3,cret@host/"), ("AMQP_URL", "amqp://svc:12,S3cret@host/"),
    ("AMQP_URL", "amqp://host/,amqp://svc:12/S3cret@host/"), ("AMQP_URL", "http://svc:S3cret@host/"),
    ("AMQP_URL", "svc:S3cret@host"), ("AMQP_URL", "amqp:svc:S3cret@host"), ("AMQP_URL", "amqp:/svc:S3cret@host"),
    ("AMQP_URL", "amqp:///svc:S3cret@host"), ("AMQP_URL", ",S3cret"),
    ("IDEMPOTENCY_URL", "redis://:S3cret@host/0/1"), ("IDEMPOTENCY_URL", "redis://:S3cret@host/zero"),
    ("IDEMPOTENCY_URL", "redis://:S3cret@host/-1"), ("IDEMPOTENCY_URL", "redis://:S3cret@host/0/"),
    ("IDEMPOTENCY_URL", "redis://:12/S3cret@host"), ("IDEMPOTENCY_URL", "unix://S3cret/socket"),
    ("IDEMPOTENCY_URL", "memory://S3cret"), ("IDEMPOTENCY_URL", "S3cret"), ("IDEMPOTENCY_URL", " redis://:S3cret@host"),
    ("ONENET_URL", "https://svc:S3cret@host"), ("ONENET_URL", "https://S3cret@host"),
    ("ONENET_URL", "https://host/S3cret@x"), ("ONENET_URL", "https://host?key=S3cret"), ("ONENET_URL", "https://host#S3cret"),
    ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://svc:S3cret^@host"), ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://svc:S3cret|@host"),
    ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://svc:S3cret@host?a=b"), ("OTEL_EXPORTER_OTLP_ENDPOINT", "grpc://:S3cret@host"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "url"),
    [*((name, f"{scheme}://{rest}") for name, scheme in SCHEMES.items() for rest in MALFORMED), *OF_ONE_SETTING],
    ids=ascii,
)
def test_a_malformed_url_is_refused_in_one_line_that_does_not_quote_it(
    name: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, url)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    [line] = caught.value.lines
    assert line.startswith(f"{name}: ")
    assert "\n" not in line
    assert not [part for part in ("S3", "cret", "svc", "prod") if part in line]


@pytest.mark.parametrize("rest", ["svc:12/S3cret@host/0/1", "svc:S3cret@@host/0"])
@pytest.mark.parametrize("name", ["AMQP_URL", "IDEMPOTENCY_URL"])
def test_a_malformed_url_in_a_secret_file_is_refused_in_one_line_that_does_not_quote_it(
    name: str, rest: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "url"
    path.write_text(f"{SCHEMES[name]}://{rest}\n", encoding="utf-8")
    monkeypatch.setenv(f"{name}_FILE", str(path))
    with pytest.raises(SettingsError) as caught:
        load_settings()
    [line] = caught.value.lines
    assert line.startswith(f"{name}: ")
    assert line.endswith(f" ({path})")
    assert not [part for part in ("S3", "cret", "svc") if part in line.removesuffix(f" ({path})")]


@pytest.mark.parametrize(
    "options",
    ["Secret=S3cret", "heartbeat=S3cret", "heartbeat=1&heartbeat=2", "ssl_options={S3cret", "ssl_options=S3cret",
     "ssl_options={'cafile':'/S3cret'}", "ssl_options={'cafile':'/dev/zero'}",
     "client_properties=S3cret", "socket_timeout=-1", "tcp_options=" + "(" * 5000],
)  # fmt: skip
def test_an_unusable_option_of_an_amqp_url_is_refused_in_one_line(
    options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMQP_URL", f"amqp://svc:S3cret@host/?{options}")
    with pytest.raises(SettingsError) as caught:
        connection_parameters(load_settings().broker_address)
    [line] = caught.value.lines
    assert line.startswith("AMQP_URL: an option ")
    assert SECRET not in line


@pytest.mark.parametrize(
    "options", ["Secret=S3cret", "db=S3cret", "timeout=5", "protocol=S3cret", "socket_timeout=S3cret"]
)
@pytest.mark.parametrize("scheme", ["redis", "rediss"])
def test_an_unusable_option_of_a_redis_url_is_refused_in_one_line(
    scheme: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IDEMPOTENCY_URL", f"{scheme}://svc:S3cret@host/?{options}")
    with pytest.raises(SettingsError) as caught:
        store_of(load_settings())
    [line] = caught.value.lines
    assert line.startswith("IDEMPOTENCY_URL: an option ")
    assert SECRET not in line


IN_USER = "in its user name or password"
NO_PORT = "must have a number from 1 to 65535 after the colon behind the host"
CAUSES = [
    ("AMQP_URL", "amqp://svc:S3/cret@host/prod", f"has an unescaped / (write %2F) {IN_USER}"),
    ("AMQP_URL", "amqp://svc:12/S3cret@host", f"has an unescaped / (write %2F) {IN_USER}"),
    ("AMQP_URL", "amqp://svc:12/S3@cret@host", f"has an unescaped / (write %2F) and @ (write %40) {IN_USER}"),
    ("AMQP_URL", "amqp://svc:12?S3=cret@host", f"has an unescaped ? (write %3F) {IN_USER}"),
    ("AMQP_URL", "amqp://svc:S3#cret@host", f"has an unescaped # (write %23) {IN_USER}"),
    ("AMQP_URL", "amqp://svc:S3%cret@host", f"has an unescaped % (write %25) {IN_USER}"),
    ("AMQP_URL", "amqp://svc:S3 cret@host", f"has an unescaped blank (write %20) {IN_USER}"),
    ("AMQP_URL", "amqp://svc:S3[cret]@host", f"has an unescaped [ (write %5B) and ] (write %5D) {IN_USER}"),
    ("AMQP_URL", "amqp://svc:S3cret\u5bc6@host",
     f"has an unescaped special character (write % and its code) {IN_USER}"),
    ("AMQP_URL", "amqp://svc:S3cret@host/prod/eu", "has an unescaped / (write %2F) in its vhost"),
    ("AMQP_URL", "amqp://svc:S3cret@host//prod", "has an unescaped / (write %2F) in its vhost"),
    ("AMQP_URL", "amqp://svc:S3cret@host/prod@eu", "has an unescaped @ (write %40) in its vhost"),
    ("AMQP_URL", "amqp://svc:S3cret@host/prod;eu", "has an unescaped ; (write %3B) in its vhost"),
    ("AMQP_URL", "amqp://host/prod#eu", "has an unescaped # (write %23) in its vhost"),
    ("AMQP_URL", "amqp://S3cret@host", "must have a password after its user name: user:password@host"),
    ("AMQP_URL", "amqp://svc:S3cret@host:70000", NO_PORT),
    ("AMQP_URL", "amqp://svc:S3cret", f"{NO_PORT}, and a user and password must end with @"),
    ("AMQP_URL", "amqp://svc:S3/cret@host/prod@eu",
     f"has an unescaped / (write %2F) and @ (write %40) {IN_USER}"),
    ("AMQP_URL", "amqp://svc:S3/cret@host/prod/eu",
     f"has an unescaped / (write %2F) {IN_USER}, and in its vhost"),
    ("IDEMPOTENCY_URL", " redis://:S3cret@host", "has a blank or a line break before it or after it"),
    ("AMQP_URL", "amqp://host,amqp://svc:S3/cret@host",
     f"URL 2 of 2 has an unescaped / (write %2F) {IN_USER}"),
    ("IDEMPOTENCY_URL", "redis://:12/S3cret@host/0", f"has an unescaped / (write %2F) {IN_USER}"),
    ("IDEMPOTENCY_URL", "redis+sentinel://:S3/cret@a,b/prod", f"has an unescaped / (write %2F) {IN_USER}"),
    ("ONENET_URL", "https://svc:S3cret@host",
     "must have no user and no password: there are settings for the credentials"),
    ("ONENET_URL", "https://host:S3cret", NO_PORT),
    ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://svc:S3/cret@host", f"has an unescaped / (write %2F) {IN_USER}"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "url", "cause"), CAUSES, ids=ascii)
def test_a_refused_url_names_the_character_that_is_the_likely_cause(
    name: str, url: str, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, url)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert caught.value.lines == [f"{name}: {cause}"]


@pytest.mark.parametrize(
    "url",
    ["amqp://svc:S3,cret@host/prod", "amqp://svc:12,S3cret@host", "amqp://a,svc:S3cret@host"],
)
def test_a_comma_in_a_password_is_told_from_one_between_urls(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMQP_URL", url)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    [line] = caught.value.lines
    assert line == "AMQP_URL: has a comma that is not between two URLs: within user, password and vhost write it as %2C"


@pytest.mark.parametrize("rest", ["svc:S3cret@host/prod", "svc:S3cret@host:5672/prod?heartbeat=7", "host/prod"])
def test_of_a_broker_url_scheme_host_and_port_are_printed(rest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMQP_URL", f"amqp://{rest}")
    assert [*map(printable_address, connection_parameters(load_settings().broker_address))] == ["amqp://host:5672"]


def test_of_a_redis_url_hosts_and_ports_are_printed() -> None:
    assert str(RedisAddress.parse("redis://svc:S3cret@host/7?client_name=prod")) == "Redis at host:6379"
    sentinels = RedisAddress.parse("redis+sentinel://svc:S3cret@a:1,b/prod/7")
    assert str(sentinels) == "Redis, by the Sentinels at a:1, b:26379"
