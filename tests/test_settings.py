"""Settings: read in one place, validated as a whole; errors are lines without secrets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from worker.core.credentials import AccessKey, ApiKey, UserKey, plaintext_host, plaintext_hosts
from worker.core.rate import Rate
from worker.errors import EXIT_CONFIG, EXIT_FAILURE, SettingsError
from worker.settings import Settings, load_products, load_settings

NAMES = [name.upper() for name in Settings.model_fields]
RENAMED = {
    "WORKER_SETTLE": "WORKER_RECONCILE_DELAY",
    "WORKER_PAUSE_AFTER": "WORKER_PAUSE_AFTER_FAILURES",
    "WORKER_PAUSE_PROBE": "WORKER_PROBE_INTERVAL",
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Isolate the test from the machine's environment and from the checkout's .env."""
    monkeypatch.chdir(tmp_path)
    for name in (*NAMES, *RENAMED):
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
    assert (settings.worker_ordering, settings.onenet_rate_limit) == ("device", "300/second")
    assert settings.onenet_device_interval == 1
    assert (settings.worker_pause_after_failures, settings.worker_probe_interval) == (20, 5)


def test_an_environment_variable_overrides_the_env_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("WORKER_CONCURRENCY=7\nWORKER_NAMESPACE=here\nSOMETHING_ELSE=1\n")
    monkeypatch.setenv("WORKER_CONCURRENCY", "9")
    settings = load_settings()
    assert (settings.worker_concurrency, settings.worker_namespace) == (9, "here")


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files pass unset variables on as empty ones."""
    monkeypatch.setenv("WORKER_CONCURRENCY", "")
    monkeypatch.setenv("ONENET_API_KEY", "")
    assert load_settings().worker_concurrency == 32
    assert load_settings().onenet_api_key is None


def test_a_list_is_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMQP_URL", "amqp://a/, amqps://b:5671/v")
    monkeypatch.setenv("WORKER_RETRY_DELAYS", "1, 1,10")
    settings = load_settings()
    assert [url.get_secret_value() for url in settings.amqp_url] == ["amqp://a/", "amqps://b:5671/v"]
    assert settings.worker_retry_delays == (1, 1, 10)


@pytest.mark.parametrize("name", ["AMQP_URL", "ONENET_API_KEY", "ONENET_ACCESS_KEY"])
def test_a_secret_is_read_from_the_file_that_name_file_names(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
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
        ("LOG_FORMAT", "xml"), ("WORKER_RECONCILE_DELAY", "12"), ("WORKER_RECONCILE_DELAY", "60.5"),
        ("IDEMPOTENCY_URL", "redis://"), ("IDEMPOTENCY_URL", "redis://:aSecret@ho st"),
        ("AMQP_URL", "amqp://user:aSecret@host/\namqp://user:aSecret@host/"), ("ONENET_URL", "https://host\n"),
        ("ONENET_API_KEY", "aSecret "), ("ONENET_API_KEY", "aSecret\n"), ("HTTP_HOST", "a\nb"), ("HTTP_HOST", "[::1]"),
        ("HTTP_HOST", "a..b"), ("HTTP_HOST", "h" * 64), ("WORKER_NAMESPACE", "onenet\n"), ("AMQP_DECLARE", "ja"),
        ("WORKER_RETRY_DELAYS", ",".join(map(str, range(1, 52)))), ("WORKER_RETRY_DELAYS", "5;30"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_reported_in_one_line_that_names_it(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    if name == "ONENET_ACCESS_KEY":
        monkeypatch.setenv("ONENET_PRODUCT_ID", "1")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    [line] = caught.value.lines
    assert line.startswith(f"{name}: ")
    assert "aSecret" not in line
    assert "\n" not in line


NUMBERS = {
    "ONENET_CONNECT_TIMEOUT": "a number from 0.1 to 300",
    "ONENET_READ_TIMEOUT": "a number from 0.1 to 300",
    "ONENET_DEVICE_INTERVAL": "a number from 0 to 60",
    "WORKER_CONCURRENCY": "a whole number from 1 to 1000",
    "WORKER_MAX_ATTEMPTS": "a whole number from 1 to 1000",
    "WORKER_RECONCILE_DELAY": "a whole number from 1 to 86400",
    "WORKER_PAUSE_AFTER_FAILURES": "a whole number from 1 to 100000",
    "WORKER_PROBE_INTERVAL": "a number from 0.01 to 3600",
    "WORKER_SHUTDOWN_GRACE": "a number from 0.1 to 3600",
    "IDEMPOTENCY_TTL": "a whole number from 1 to 315360000",
    "IDEMPOTENCY_WAIT_REPLICAS": "a whole number from 0 to 100",
    "HTTP_PORT": "a whole number from 0 to 65535",
}


@pytest.mark.parametrize("value", ["-1", "100000000000000", "1e400", "1" * 5000, "nan", "inf", "5s", "0x10", "1,5"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_its_range_is_reported_with_the_range(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the beginning of what was given, which is no secret."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    shown = value if len(value) <= 40 else f"{value[:40]}…"
    assert caught.value.lines == [f"{name}: must be {NUMBERS[name]}, not {shown!r}"]


def test_every_number_among_the_settings_has_a_range() -> None:
    numbers = {name.upper() for name, field in Settings.model_fields.items() if field.annotation in (int, float)}
    assert numbers == set(NUMBERS)


@pytest.mark.parametrize(("text", "number"), [("1_000", 1000), ("+7", 7), (" 7 ", 7), ("7.0", 7)])
def test_a_whole_number_may_be_written_in_several_ways(text: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_MAX_ATTEMPTS", text)
    assert load_settings().worker_max_attempts == number


@pytest.mark.parametrize("text", ["no", "off", "0", "False", "N"])
def test_a_switch_may_be_written_in_several_ways(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMQP_DECLARE", text)
    assert not load_settings().amqp_declare


def test_each_wrong_setting_is_reported_in_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_CONCURRENCY", "many")
    monkeypatch.setenv("LOG_LEVEL", "loud")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert [line.partition(":")[0] for line in caught.value.lines] == ["WORKER_CONCURRENCY", "LOG_LEVEL"]


@pytest.mark.parametrize("password", ["pa/ss", "pa[x]ss", "pa/ss:1", "pa]ss"])
def test_a_password_that_makes_its_url_invalid_is_not_quoted(password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMQP_URL", f"amqp://user:{password}@host/")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert not [part for part in ("pa", "ss", "[x]") if part in str(caught.value).replace("password", "")]


def test_the_reconcile_delay_has_a_delay_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_RECONCILE_DELAY", "13")
    assert load_settings().delay_queues_s == (5, 13, 30, 120, 600)


@pytest.mark.parametrize(("delay", "is_enough"), [("4", False), ("5", True), ("6", True)])
def test_the_reconcile_delay_is_at_least_both_timeouts_together(
    delay: str, is_enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shorter delay would read the history while the request may still be in flight."""
    for name, value in (("CONNECT", "2"), ("READ", "2.5")):
        monkeypatch.setenv(f"ONENET_{name}_TIMEOUT", value)
    monkeypatch.setenv("WORKER_RECONCILE_DELAY", delay)
    if is_enough:
        assert load_settings().request_s == 4.5
        return
    with pytest.raises(SettingsError) as caught:
        load_settings()
    [line] = caught.value.lines
    assert line.startswith("WORKER_RECONCILE_DELAY: must be at least ONENET_CONNECT_TIMEOUT and ONENET_READ_TIMEOUT")
    assert "4.5" in line


def test_equal_delays_share_one_delay_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_RETRY_DELAYS", "30,60,60")
    assert load_settings().delay_queues_s == (30, 60)


@pytest.mark.parametrize(
    "url", ["http://:aSecret@host", "redis+ssl://:aSecret@host", "rediss://:aSecret@host:0", "memory:", "aSecret"]
)
def test_an_idempotency_url_of_another_scheme_is_rejected(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDEMPOTENCY_URL", url)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    [line] = caught.value.lines
    assert line.startswith("IDEMPOTENCY_URL: must ")
    assert "aSecret" not in line


@pytest.mark.parametrize("url", ["redis://:aSecret@host:6379/1", "rediss://host", "memory://"])
def test_an_idempotency_url_is_accepted_and_kept_secret(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDEMPOTENCY_URL", url)
    found = load_settings()
    assert found.idempotency_url.get_secret_value() == url
    assert "aSecret" not in repr(found)


def test_a_choice_may_be_in_capitals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_LEVEL", "INFO")
    monkeypatch.setenv("LOG_FORMAT", "JSON")
    assert (load_settings().log_level, load_settings().log_format) == ("info", "json")


def test_an_env_file_that_cannot_be_read_is_reported(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"LOG_LEVEL=\xff\xfe")
    with pytest.raises(SettingsError, match=r"\.env: line 1 is not in UTF-8"):
        load_settings()


def test_a_ca_file_without_certificates_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
def test_credentials_of_exactly_one_mode_must_be_complete(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="ONENET_ACCESS_KEY: set"):
        load_settings()


def test_each_incomplete_pair_of_settings_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    monkeypatch.setenv("AMQP_CERT_FILE", str(tmp_path / "cert.pem"))
    monkeypatch.setenv("ONENET_PRODUCT_ID", "1")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert [line.partition(":")[0] for line in caught.value.lines] == [
        "AMQP_CERT_FILE, AMQP_KEY_FILE",
        "ONENET_PRODUCT_ID, ONENET_ACCESS_KEY",
    ]


def test_each_product_has_its_own_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "products.json").write_text(
        '{"heating": {"api_key": "h"}, "cooling": {"product_id": "7", "access_key": "aGk="}}'
    )
    monkeypatch.setenv("ONENET_PRODUCTS_FILE", str(tmp_path / "products.json"))
    products = load_products(load_settings())
    assert set(products) == {"heating", "cooling"}
    assert isinstance(products["heating"].credentials, ApiKey)
    assert isinstance(products["cooling"].credentials, AccessKey)
    monkeypatch.setenv("ONENET_API_KEY", "k")
    assert set(load_products(load_settings())) == {None, "heating", "cooling"}


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"a": 1}', '{"a": {}}', '{"a": {"api_key": ""}}', '{"a": {"api_key": "aSecret", "other": 1}}',
     '{"a": {"product_id": "1", "access_key": "aSecret!"}}', '{"a": {"api_key": "aSecret", "api": "v3"}}',
     '{"a": {"api_key": "aSecret", "api": "v2"}}', '{"a": {"user_id": "1", "access_key": "aGk="}}',
     '{"a": {"api_key": "aSecret", "url": "https://iot-api.heclouds.com"}}',
     '{"a": {"api_key": "aSecret", "url": "https://user:aSecret@host"}}',
     '{"a": {"product_id": "1", "user_id": "1", "access_key": "aGk=", "api": "v2"}}',
     '{"a": {"user_id": "1", "api": "v2"}}', '{"a": {"api_key": "aSecret", "url": 7}}'],
)  # fmt: skip
def test_an_unusable_products_file_is_reported_without_its_secrets(
    content: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "products.json").write_text(content)
    monkeypatch.setenv("ONENET_PRODUCTS_FILE", str(tmp_path / "products.json"))
    with pytest.raises(SettingsError) as caught:
        load_products(load_settings())
    [line] = caught.value.lines
    assert line.startswith("ONENET_PRODUCTS_FILE: ")
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
def test_a_rate_limit_is_a_count_and_a_unit(text: str, rate: Rate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONENET_RATE_LIMIT", text)
    assert load_settings().rate == rate
    assert Rate.parse(str(rate)) == rate


@pytest.mark.parametrize("text", ["off", "OFF", "Off"])
def test_off_in_any_case_means_no_rate_limit(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONENET_RATE_LIMIT", text)
    assert load_settings().rate is None


@pytest.mark.parametrize("text", ["-1", "61", "nan", "inf", "1s"])
def test_an_unusable_interval_is_reported(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONENET_DEVICE_INTERVAL", text)
    with pytest.raises(SettingsError, match="ONENET_DEVICE_INTERVAL: "):
        load_settings()


@pytest.mark.parametrize("text", ["200", "0/second", "-1/second", "1.5/second", "200/fortnight", "1/second,2/hour"])
def test_a_malformed_rate_limit_is_reported(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONENET_RATE_LIMIT", text)
    with pytest.raises(SettingsError, match="ONENET_RATE_LIMIT: must be a count and a unit"):
        load_settings()


V1, V2 = "https://api.heclouds.com", "https://iot-api.heclouds.com"


@pytest.mark.parametrize(
    ("url", "api", "used"),
    [
        (V1, None, "v1"),
        (V2, None, "v2"),
        ("https://IOT-API.example.org/base", "AUTO", "v2"),
        ("https://api.zj.cmcconenet.com", "auto", "v1"),
        ("http://10.0.0.1:8080/iot-api.", "auto", "v1"),
        ("http://10.0.0.1:8080", "v2", "v2"),
        (V2, "v1", "v1"),
    ],
)
def test_the_generation_of_the_platform_is_set_or_told_by_the_host(
    url: str, api: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONENET_URL", url)
    monkeypatch.setenv("ONENET_API", api or "")
    monkeypatch.setenv("ONENET_PRODUCT_ID", "1")
    monkeypatch.setenv("ONENET_ACCESS_KEY", "aGk=")
    assert load_products(load_settings())[None].api == used


def test_the_key_of_a_user_signs_for_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONENET_URL", V2)
    monkeypatch.setenv("ONENET_USER_ID", "511932")
    monkeypatch.setenv("ONENET_ACCESS_KEY", "aGk=")
    credentials = load_products(load_settings())[None].credentials
    assert isinstance(credentials, UserKey)
    assert credentials.resource == "userid/511932"


@pytest.mark.parametrize(
    ("settings", "beginning"),
    [
        ({"ONENET_API": "v3"}, "ONENET_API: "),
        ({"ONENET_URL": V2, "ONENET_API_KEY": "k"}, "ONENET_API_KEY: is for v1"),
        ({"ONENET_API": "v2", "ONENET_API_KEY": "k"}, "ONENET_API_KEY: is for v1"),
        ({"ONENET_USER_ID": "1", "ONENET_ACCESS_KEY": "aGk="}, "ONENET_USER_ID: is for v2"),
        ({"ONENET_URL": V2, "ONENET_API": "v1", "ONENET_USER_ID": "1", "ONENET_ACCESS_KEY": "aGk="},
         "ONENET_USER_ID: is for v2"),
        ({"ONENET_URL": V2, "ONENET_USER_ID": "1"}, "ONENET_USER_ID, ONENET_ACCESS_KEY: set both"),
        ({"ONENET_URL": V2, "ONENET_PRODUCT_ID": "1", "ONENET_USER_ID": "1", "ONENET_ACCESS_KEY": "aGk="},
         "ONENET_PRODUCT_ID, ONENET_USER_ID: set one"),
        ({"ONENET_URL": V2, "ONENET_API_KEY": "k", "ONENET_USER_ID": "1", "ONENET_ACCESS_KEY": "aGk="},
         "ONENET_API_KEY, ONENET_ACCESS_KEY: set one"),
        ({"ONENET_USER_ID": "a b", "ONENET_ACCESS_KEY": "aGk=", "ONENET_API": "v2"}, "ONENET_USER_ID: "),
    ],
    ids=str,
)  # fmt: skip
def test_each_wrong_combination_of_credentials_and_generation_is_one_line(
    settings: dict[str, str], beginning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    [line] = caught.value.lines
    assert line.startswith(beginning)


def test_a_product_may_be_at_a_platform_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    signing = {"product_id": "7", "access_key": "aGk="}
    entries = {
        "here": signing,
        "there": signing | {"url": f"{V2}/"},
        "user": {"user_id": "1", "access_key": "aGk=", "url": "http://10.0.0.1", "api": "V2"},
    }
    (tmp_path / "products.json").write_text(json.dumps(entries))
    monkeypatch.setenv("ONENET_PRODUCTS_FILE", str(tmp_path / "products.json"))
    products = load_products(load_settings())
    assert {name: (product.url, product.api) for name, product in products.items()} == {
        "here": (V1, "v1"),
        "there": (V2, "v2"),
        "user": ("http://10.0.0.1", "v2"),
    }
    assert plaintext_hosts(products) == ["10.0.0.1"]
    monkeypatch.setenv("ONENET_API", "v2")
    assert {product.api for product in load_products(load_settings()).values()} == {"v2"}


def test_missing_credentials_are_reported() -> None:
    with pytest.raises(SettingsError, match="ONENET_API_KEY: not set"):
        load_products(load_settings())


def test_printed_settings_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_credentials_travel_in_plaintext_unless_by_https_or_to_a_loopback_address(url: str, host: str | None) -> None:
    assert plaintext_host(url) == host


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
@pytest.mark.parametrize("place", ["environment", "env file", "both, and the new name too"])
def test_the_old_name_of_a_setting_is_an_error_that_names_the_new_one(
    old: str, new: str, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An operator who upgrades must not run with a default instead of the value that was set."""
    if place != "environment":
        (tmp_path / ".env").write_text(f"{old}=77\n")
    if place != "env file":
        monkeypatch.setenv(old, "77")
    if place == "both, and the new name too":
        monkeypatch.setenv(new, "77")
    monkeypatch.setenv("LOG_LEVEL", "loud")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert caught.value.lines[0] == f"{old}: was renamed; set {new} instead"
    assert [line.partition(":")[0] for line in caught.value.lines] == [old, "LOG_LEVEL"]


def test_an_empty_variable_of_an_old_name_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for old in RENAMED:
        monkeypatch.setenv(old, "")
    assert load_settings().worker_reconcile_delay == 60


def test_the_env_file_may_name_the_file_of_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("k\n")
    (tmp_path / ".env").write_text(f"ONENET_API_KEY_FILE={tmp_path / 'secret'}\n")
    found = load_settings().onenet_api_key
    assert found is not None
    assert found.get_secret_value() == "k"
    monkeypatch.setenv("ONENET_API_KEY", "other")
    with pytest.raises(SettingsError, match="ONENET_API_KEY_FILE: set, and ONENET_API_KEY too"):
        load_settings()


def test_a_secret_file_and_other_wrong_settings_are_reported_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("IDEMPOTENCY_URL_FILE", str(tmp_path / "missing"))
    monkeypatch.setenv("LOG_LEVEL", "loud")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert [line.partition(":")[0] for line in caught.value.lines] == ["IDEMPOTENCY_URL_FILE", "LOG_LEVEL"]


@pytest.mark.parametrize(("command", "exit_code"), [("run", EXIT_CONFIG), ("check", EXIT_FAILURE)])
def test_commands_report_the_old_name_of_a_setting(command: str, exit_code: int, tmp_path: Path) -> None:
    environment = {**os.environ, "WORKER_SETTLE": "60", "ONENET_API_KEY": "k"}
    ended = subprocess.run(
        [sys.executable, "-m", "worker", command],
        check=False,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == exit_code
    assert "WORKER_SETTLE: was renamed; set WORKER_RECONCILE_DELAY instead\n" in ended.stdout + ended.stderr
