"""Misspelt settings: said, each with the setting that may be meant, and never with its value."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from scripts.documents import ROOT
from worker.settings import Settings, find_unknown_settings

MISSPELT = {
    "WORKER_CONCURENCY": "WORKER_CONCURRENCY",
    "worker_concurency": "WORKER_CONCURRENCY",
    "Worker_Concurency": "WORKER_CONCURRENCY",
    "ONENET_RATELIMIT": "ONENET_RATE_LIMIT",
    "ONENET_APIKEY": "ONENET_API_KEY",
    "ONENET_API_KEY_FIL": "ONENET_API_KEY_FILE",
    "AMQP_URI": "AMQP_URL",
    "AMQP_URL_FLIE": "AMQP_URL_FILE",
    "IDEMPOTENCY_REDIS_URL": "IDEMPOTENCY_URL",
    "HTTP_POTR": "HTTP_PORT",
    "HTTP_PORXY": "HTTP_PROXY",
    "WORKER_RESULT_DELAY": "WORKER_RESULT_DELAYS",
    "WORKER_SETTEL": "WORKER_SETTLE",  # which is an error that names the present one
    "WORKER_PARTITIONS": None,  # there is no such setting yet
    "CONSOLE_PORT": None,
    "HTTP_LISTEN": None,
    "AMQP_HOST": None,
    "WORKER_CONCURRENCY_": "WORKER_CONCURRENCY",
}
KUBERNETES = {  # for services "worker", "amqp" and "onenet-worker" of the same namespace
    "WORKER_SERVICE_HOST": "10.0.0.1",
    "WORKER_SERVICE_PORT": "9108",
    "WORKER_SERVICE_PORT_HTTP": "9108",
    "WORKER_PORT": "tcp://10.0.0.1:9108",
    "WORKER_PORT_9108_TCP": "tcp://10.0.0.1:9108",
    "WORKER_PORT_9108_TCP_PROTO": "tcp",
    "WORKER_PORT_9108_TCP_PORT": "9108",
    "WORKER_PORT_9108_TCP_ADDR": "10.0.0.1",
    "AMQP_SERVICE_HOST": "10.0.0.2",
    "AMQP_PORT_5672_TCP": "tcp://10.0.0.2:5672",
    "ONENET_WORKER_PORT": "tcp://10.0.0.3:9108",
    "ONENET_WORKER_PORT_53_UDP_ADDR": "10.0.0.3",
    "CONSOLE_SERVICE_PORT_HTTPS": "443",
}
OF_OTHERS = {
    "HTTP_PROXY": "http://proxy:3128",
    "http_proxy": "http://proxy:3128",
    "HTTP_PROXY_REQUEST_FULLURI": "1",
    "HTTPS_PROXY": "http://proxy:3128",
    "HTTPS_PROY": "http://proxy:3128",
    "AMQPS_URL": "x",
    "WORKER": "x",
    "WORKER_": "x",
    "MY_WORKER_CONCURENCY": "7",
    "LOG_LEVL": "debug",
    "WORKER_CONCURENCY": "",  # an empty variable counts as not set
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of the machine and no .env of the checkout is seen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.environ", {})


def found(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Return the unknown names in an environment, and the suggestions."""
    monkeypatch.setattr("os.environ", dict(environment))
    return {unknown.name: unknown.suggestion for unknown in find_unknown_settings()}


@pytest.mark.parametrize(("name", "suggestion"), MISSPELT.items())
@pytest.mark.parametrize("place", ["the environment", ".env"])
def test_a_name_that_looks_like_a_setting_and_is_none_is_found(
    name: str, suggestion: str | None, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == ".env":
        Path(".env").write_text(f"# settings\n{name}=aSecret\n")
    assert found({name: "aSecret"} if place == "the environment" else {}, monkeypatch) == {name: suggestion}
    [line] = map(str, find_unknown_settings())
    advice = f"did you mean {suggestion}?" if suggestion else "docs/configuration.md lists the settings"
    assert line == f"{name}: is not a setting, and has no effect ({place}): {advice}"


def test_a_name_in_both_places_is_told_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("WORKER_CONCURENCY=8\n")
    monkeypatch.setattr("os.environ", {"WORKER_CONCURENCY": "7"})
    assert [unknown.place for unknown in find_unknown_settings()] == ["the environment", ".env"]


def test_what_is_wrong_with_the_env_file_is_no_unknown_setting() -> None:
    Path(".env").write_text("WORKER_CONCURENCY\x00\n")
    assert find_unknown_settings() == []


def test_every_setting_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*Settings.model_fields, "amqp_url_file", "onenet_api_key_file", "onenet_access_key_file", "worker_settle"]
    assert found({name.upper(): "x" for name in [*names, "idempotency_url_file"]}, monkeypatch) == {}
    assert found(dict.fromkeys(names, "x"), monkeypatch) == {}


def test_what_kubernetes_sets_for_services_is_not_misspelt(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(KUBERNETES, monkeypatch) == {}


def test_a_port_that_is_no_address_of_a_service_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is what looks like a variable of Kubernetes and is written by hand."""
    assert found({"WORKER_PORT": "9108"}, monkeypatch) == {"WORKER_PORT": None}
    Path(".env").write_text("WORKER_SERVICE_HOST=10.0.0.1\n")
    assert found({}, monkeypatch) == {"WORKER_SERVICE_HOST": None}


def test_names_of_others_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(OF_OTHERS, monkeypatch) == {}


def test_variables_of_the_compose_file_are_not_misspelt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A .env beside it may set them, and be read by a worker that is started there."""
    names = set(re.findall(r"\$\{(\w+)", (ROOT / "docker" / "compose.yaml").read_text()))
    assert {"WORKER_IMAGE", "AMQP_PORT"} <= names
    assert found(dict.fromkeys(names, "x"), monkeypatch) == {}
