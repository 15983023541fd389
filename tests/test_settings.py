"""Settings: read in one place, checked whole, told in lines that hold no secret."""

from pathlib import Path

import pytest

from worker.errors import SettingsError
from worker.settings import AccessKey, ApiKey, Rate, Settings, load_products, load_settings

NAMES = [name.upper() for name in Settings.model_fields]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of the machine and no .env of the checkout has a say."""
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_the_defaults_are_those_of_the_contract() -> None:
    settings = load_settings()
    assert [url.get_secret_value() for url in settings.amqp_url] == ["amqp://guest:guest@localhost:5672/"]
    assert settings.onenet_url == "https://api.heclouds.com"
    assert (settings.onenet_connect_timeout, settings.onenet_read_timeout) == (3, 10)
    assert (settings.onenet_timezone, settings.worker_namespace) == ("Asia/Shanghai", "onenet")
    assert (settings.worker_concurrency, settings.worker_max_attempts) == (32, 10)
    assert settings.worker_retry_delays == (5, 30, 120, 600)
    assert (settings.worker_shutdown_grace, settings.idempotency_ttl) == (30, 604800)
    assert settings.idempotency_url.get_secret_value() == "memory://"
    assert (settings.amqp_declare, settings.worker_in_doubt, settings.log_level) == (True, "reconcile", "info")
    assert (settings.worker_ordering, settings.onenet_rate_limit) == ("device", None)
    assert (settings.worker_pause_after, settings.worker_pause_probe) == (20, 5)


def test_the_environment_comes_before_the_env_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("WORKER_CONCURRENCY=7\nWORKER_NAMESPACE=here\nSOMETHING_ELSE=1\n")
    monkeypatch.setenv("WORKER_CONCURRENCY", "9")
    settings = load_settings()
    assert (settings.worker_concurrency, settings.worker_namespace) == (9, "here")


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files pass on what is not set as nothing."""
    monkeypatch.setenv("WORKER_CONCURRENCY", "")
    monkeypatch.setenv("ONENET_API_KEY", "")
    assert load_settings().worker_concurrency == 32
    assert load_settings().onenet_api_key is None


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMQP_URL", "amqp://a/, amqps://b:5671/v")
    monkeypatch.setenv("WORKER_RETRY_DELAYS", "1, 1,10")
    settings = load_settings()
    assert [url.get_secret_value() for url in settings.amqp_url] == ["amqp://a/", "amqps://b:5671/v"]
    assert settings.worker_retry_delays == (1, 1, 10)


@pytest.mark.parametrize("name", ["AMQP_URL", "ONENET_API_KEY", "ONENET_ACCESS_KEY"])
def test_a_secret_may_lie_in_a_file(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    value = "amqp://user:aGk=@host/" if name == "AMQP_URL" else "aGk="
    (tmp_path / "secret").write_text(f"{value}\n")
    monkeypatch.setenv(f"{name}_FILE", str(tmp_path / "secret"))
    monkeypatch.setenv("ONENET_PRODUCT_ID", "" if name != "ONENET_ACCESS_KEY" else "1")
    found = getattr(load_settings(), name.lower())
    assert (found[0] if isinstance(found, tuple) else found).get_secret_value() == value
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"{name}_FILE: set, and {name} too"):
        load_settings()
    monkeypatch.delenv(name)
    (tmp_path / "empty").write_text("\n")
    monkeypatch.setenv(f"{name}_FILE", str(tmp_path / "empty"))
    with pytest.raises(SettingsError, match=f"{name}_FILE: is empty"):
        load_settings()
    monkeypatch.setenv(f"{name}_FILE", str(tmp_path / "missing"))
    with pytest.raises(SettingsError, match=f"{name}_FILE: cannot be read"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AMQP_URL", "http://host/"), ("AMQP_URL", "amqp://host:port/"), ("AMQP_CA_FILE", "/no/such/file"),
        ("AMQP_DECLARE", "perhaps"), ("ONENET_URL", "api.heclouds.com"), ("ONENET_URL", "https://host/?q=1"),
        ("ONENET_URL", "http://exa mple"), ("ONENET_URL", "http://*x"), ("ONENET_URL", "http://.x"),
        ("ONENET_URL", "http://%zz"), ("ONENET_URL", "http://user:aSecret@host"), ("ONENET_URL", "http://host:0"),
        ("ONENET_API_KEY", "with blank"), ("ONENET_PRODUCT_ID", "a b"), ("WORKER_RETRY_DELAYS", "a,b,c"),
        ("ONENET_API_KEY", "with\u00e9"), ("ONENET_ACCESS_KEY", "no base64!"),
        ("ONENET_CONNECT_TIMEOUT", "0"), ("ONENET_READ_TIMEOUT", "soon"), ("ONENET_TIMEZONE", "Mars/Olympus"),
        ("ONENET_TIMEZONE", "../etc/passwd"), ("WORKER_NAMESPACE", "a b"), ("WORKER_CONCURRENCY", "0"),
        ("WORKER_RETRY_DELAYS", "5,x"), ("WORKER_RETRY_DELAYS", "30,5"), ("WORKER_RETRY_DELAYS", "0"),
        ("WORKER_RETRY_DELAYS", ","), ("WORKER_MAX_ATTEMPTS", "0"), ("WORKER_IN_DOUBT", "guess"),
        ("WORKER_SHUTDOWN_GRACE", "-1"), ("IDEMPOTENCY_URL", "mysql://user:aSecret@host"), ("LOG_LEVEL", "loud"),
        ("LOG_FORMAT", "xml"), ("WORKER_SETTLE", "12"), ("WORKER_SETTLE", "60.5"), ("IDEMPOTENCY_URL", "redis://"),
        ("IDEMPOTENCY_URL", "redis://:aSecret@ho st"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_line_that_names_it(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    if name == "ONENET_ACCESS_KEY":
        monkeypatch.setenv("ONENET_PRODUCT_ID", "1")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    [line] = caught.value.lines
    assert line.startswith(f"{name}: ")
    assert "aSecret" not in line
    assert "\n" not in line


def test_every_wrong_setting_has_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_CONCURRENCY", "many")
    monkeypatch.setenv("LOG_LEVEL", "loud")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert [line.partition(":")[0] for line in caught.value.lines] == ["WORKER_CONCURRENCY", "LOG_LEVEL"]


@pytest.mark.parametrize("password", ["pa/ss", "pa[x]ss", "pa/ss:1", "pa]ss"])
def test_a_password_that_breaks_its_url_is_not_quoted(password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMQP_URL", f"amqp://user:{password}@host/")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert not [part for part in ("pa", "ss", "[x]") if part in str(caught.value).replace("password", "")]


def test_a_doubt_rests_as_long_as_a_request_may_take_and_has_a_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_SETTLE", "13")
    assert load_settings().delay_queues_s == (5, 13, 30, 120, 600)


@pytest.mark.parametrize(("settle", "is_enough"), [("4", False), ("5", True), ("6", True)])
def test_a_doubt_rests_no_shorter_than_the_two_timeouts_together(
    settle: str, is_enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the history would be read while the request may still be under way."""
    for name, value in (("CONNECT", "2"), ("READ", "2.5")):
        monkeypatch.setenv(f"ONENET_{name}_TIMEOUT", value)
    monkeypatch.setenv("WORKER_SETTLE", settle)
    if is_enough:
        assert load_settings().request_s == 4.5
        return
    with pytest.raises(SettingsError) as caught:
        load_settings()
    [line] = caught.value.lines
    assert line.startswith("WORKER_SETTLE: must not be less than ONENET_CONNECT_TIMEOUT and ONENET_READ_TIMEOUT")
    assert "4.5" in line


def test_a_delay_that_is_there_twice_has_one_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_RETRY_DELAYS", "30,60,60")
    assert load_settings().delay_queues_s == (30, 60)


@pytest.mark.parametrize(
    "url", ["http://:aSecret@host", "redis+ssl://:aSecret@host", "rediss://:aSecret@host:0", "memory:", "aSecret"]
)
def test_no_other_place_to_remember_commands_is_taken(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDEMPOTENCY_URL", url)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    [line] = caught.value.lines
    assert line.startswith("IDEMPOTENCY_URL: must be memory://, redis://")
    assert "aSecret" not in line


@pytest.mark.parametrize("url", ["redis://:aSecret@host:6379/1", "rediss://host", "memory://"])
def test_where_commands_are_remembered(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDEMPOTENCY_URL", url)
    found = load_settings()
    assert found.idempotency_url.get_secret_value() == url
    assert "aSecret" not in repr(found)


def test_words_may_be_in_capitals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_LEVEL", "INFO")
    monkeypatch.setenv("LOG_FORMAT", "JSON")
    assert (load_settings().log_level, load_settings().log_format) == ("info", "json")


def test_an_env_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"LOG_LEVEL=\xff\xfe")
    with pytest.raises(SettingsError, match=r"\.env: cannot be read"):
        load_settings()


def test_a_file_of_authorities_without_any_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing\n")
    monkeypatch.setenv("ONENET_CA_FILE", str(tmp_path / "ca.pem"))
    with pytest.raises(SettingsError, match="ONENET_CA_FILE: holds no certificate"):
        load_settings()


@pytest.mark.parametrize(
    "settings",
    [
        {"ONENET_PRODUCT_ID": "1"},
        {"ONENET_ACCESS_KEY": "aGk="},
        {"ONENET_API_KEY": "k", "ONENET_PRODUCT_ID": "1", "ONENET_ACCESS_KEY": "aGk="},
    ],
    ids=str,
)
def test_one_way_of_authentication_is_set_whole(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="ONENET_ACCESS_KEY: set"):
        load_settings()


def test_what_does_not_belong_together_is_said_of_each_pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cert.pem").touch()
    monkeypatch.setenv("AMQP_CERT_FILE", str(tmp_path / "cert.pem"))
    monkeypatch.setenv("ONENET_PRODUCT_ID", "1")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert [line.partition(":")[0] for line in caught.value.lines] == [
        "AMQP_CERT_FILE, AMQP_KEY_FILE",
        "ONENET_PRODUCT_ID, ONENET_ACCESS_KEY",
    ]


def test_products_have_their_own_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "products.json").write_text(
        '{"heating": {"api_key": "h"}, "cooling": {"product_id": "7", "access_key": "aGk="}}'
    )
    monkeypatch.setenv("ONENET_PRODUCTS_FILE", str(tmp_path / "products.json"))
    products = load_products(load_settings())
    assert set(products) == {"heating", "cooling"}
    assert isinstance(products["heating"], ApiKey)
    assert isinstance(products["cooling"], AccessKey)
    monkeypatch.setenv("ONENET_API_KEY", "k")
    assert set(load_products(load_settings())) == {None, "heating", "cooling"}


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"a": 1}', '{"a": {}}', '{"a": {"api_key": ""}}', '{"a": {"api_key": "aSecret", "other": 1}}',
     '{"a": {"product_id": "1", "access_key": "aSecret!"}}'],
)  # fmt: skip
def test_a_products_file_that_cannot_be_used_is_said(
    content: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "products.json").write_text(content)
    monkeypatch.setenv("ONENET_PRODUCTS_FILE", str(tmp_path / "products.json"))
    with pytest.raises(SettingsError) as caught:
        load_products(load_settings())
    assert all(line.startswith("ONENET_PRODUCTS_FILE: ") for line in caught.value.lines)
    assert "aSecret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("200/second", Rate(200, 1)),
        ("1000 / Minute", Rate(1000, 60)),
        ("5/hour", Rate(5, 3600)),
        ("1/day", Rate(1, 86_400)),
    ],
)
def test_a_rate_is_a_count_and_a_unit(text: str, rate: Rate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONENET_RATE_LIMIT", text)
    assert load_settings().rate == rate


@pytest.mark.parametrize("text", ["200", "0/second", "-1/second", "1.5/second", "200/fortnight", "1/second,2/hour"])
def test_any_other_rate_is_said(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONENET_RATE_LIMIT", text)
    with pytest.raises(SettingsError, match="ONENET_RATE_LIMIT: must be a count and a unit"):
        load_settings()


def test_without_any_credentials_there_is_no_start() -> None:
    with pytest.raises(SettingsError, match="ONENET_API_KEY: not set"):
        load_products(load_settings())


def test_no_secret_is_in_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMQP_URL", "amqp://user:aSecret@host/")
    monkeypatch.setenv("ONENET_API_KEY", "aSecret")
    assert "aSecret" not in repr(load_settings()) + str(load_settings()) + load_settings().model_dump_json()


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://api.heclouds.com", None),
        ("http://localhost:8580", None),
        ("http://127.0.0.1:8580", None),
        ("http://127.9.9.9", None),
        ("http://[::1]:8580/base", None),
        ("http://api.heclouds.com", "api.heclouds.com"),
        ("http://192.0.2.1:8580", "192.0.2.1"),
        ("http://localhost.example.org", "localhost.example.org"),
        ("http://[2001:db8::1]/", "2001:db8::1"),
    ],
)
def test_a_key_is_readable_on_its_way_unless_by_https_or_on_this_machine(
    url: str, host: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONENET_URL", url)
    assert load_settings().readable_at == host


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("WORKER_RECONCILE_DELAY", "worker_settle"),
        ("WORKER_PAUSE_AFTER_FAILURES", "worker_pause_after"),
        ("WORKER_PROBE_INTERVAL", "worker_pause_probe"),
    ],
)
def test_a_setting_is_known_by_the_contracts_name_too(name: str, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "77")
    assert getattr(load_settings(), field) == 77
    monkeypatch.setenv(name, "0")
    with pytest.raises(SettingsError, match=field.upper()):
        load_settings()
