"""No user and no password of a URL is printed by a command, in a log or in a traceback."""

import socket
from pathlib import Path

import pytest

from tests.support.builders import a_command
from tests.support.command_line import TARGET_OPTIONS, run_cli
from tests.support.deployment import Deployment
from tests.support.proxies import raw_server
from tests.support.startup_code import run_at_startup
from worker.amqp.blocking import declare_on
from worker.dev.services.ports import free_port

PARTS = ("S3", "cret", "svc")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def assert_no_secret(output: str) -> None:
    """Check that the output contains no part of the secret URL."""
    assert not [part for part in PARTS if part in output], output


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("AMQP_URL", "amqp://svc:/S3cret@host:5672/prod"),
        ("AMQP_URL", "amqp://svc:12/S3cret@host:5672/prod"),
        ("AMQP_URL", "amqp://svc:S3/cret@host:5672/prod"),
        ("AMQP_URL", "amqp://svc:S3,cret@host/prod"),
        ("AMQP_URL", "amqp://svc:S3@cret@host/prod"),
        ("AMQP_URL", "amqp://svc:S3cret@host/my/vhost"),
        ("IDEMPOTENCY_URL", "redis://svc:12/S3cret@host:6379/0"),
        ("IDEMPOTENCY_URL", "redis://:S3#cret@host:6379/0"),
        ("ONENET_URL", "https://svc:S3cret@host"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://svc:12/S3cret@collector:4318"),
    ],
)
def test_every_command_refuses_a_malformed_url_in_one_line(name: str, url: str, tmp_path: Path) -> None:
    settings = {"ONENET_API_KEY": "k", name: url}
    for command in (("run",), ("topology",), ("send", *TARGET_OPTIONS)):
        result = run_cli(*command, folder=tmp_path, **settings)
        assert (result.returncode, result.stdout) == (78, "")
        [line] = result.stderr.splitlines()
        assert line.startswith(f"onenet-worker: {name}: ")
        assert_no_secret(line)
    check = run_cli("check", folder=tmp_path, **settings)
    assert (check.returncode, check.stderr) == (1, "")
    [line] = check.stdout.splitlines()
    assert line.startswith(f"FAIL  settings: {name}: ")
    assert_no_secret(line)


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("AMQP_URL", "amqp://svc:S3cret@host/?ssl_options={S3cret"),
        ("AMQP_URL", "amqp://svc:S3cret@host/?cret=S3cret"),
        ("IDEMPOTENCY_URL", "redis://svc:S3cret@host/0?cret=S3cret"),
    ],
)
def test_an_invalid_url_option_is_reported_in_one_line(name: str, url: str, deployment: Deployment) -> None:
    settings = {
        "AMQP_URL": deployment.broker_url,
        "ONENET_URL": deployment.simulator.url,
        "ONENET_API_KEY": "k",
        name: url,
    }
    result = run_cli("run", folder=deployment.folder, **settings)
    assert (result.returncode, result.stdout) == (78, "")
    [line] = result.stderr.splitlines()
    assert line.startswith(f"onenet-worker: {name}: an option ")
    assert_no_secret(line)
    check = run_cli("check", folder=deployment.folder, NO_PROXY="127.0.0.1", **settings)
    assert (check.returncode, check.stderr) == (1, "")
    assert f"FAIL  settings: {name}: an option " in check.stdout
    assert_no_secret(check.stdout)


@pytest.mark.parametrize(
    "proxy",
    [
        "http://svc:S3/cret@proxy:3128",
        "http://svc:12/S3cret@proxy:3128",
        "svc:S3#cret@proxy",
        "http://svc:S3 cret@proxy",
        "socks5://svc:S3cret@proxy:1080",
        "http://svc:S3cret@proxy:port",
        "http://svc:S3cret\u5bc6@proxy",
        "http://svc:S3[cret@proxy:x",
        "http://svc:[S3cret]@proxy",
        "http://svc:S3cret@[::1",
    ],
)
def test_an_unusable_proxy_of_the_environment_is_reported_in_one_line(proxy: str, deployment: Deployment) -> None:
    settings = {"AMQP_URL": deployment.broker_url, "ONENET_API_KEY": "k", "ONENET_URL": "https://onenet.invalid"}
    result = run_cli("run", folder=deployment.folder, HTTPS_PROXY=proxy, **settings)
    assert (result.returncode, result.stdout) == (78, "")
    [line] = result.stderr.splitlines()
    assert_no_secret(line)
    check = run_cli("check", folder=deployment.folder, HTTPS_PROXY=proxy, **settings)
    assert (check.returncode, check.stderr) == (1, "")
    assert "FAIL  settings: " in check.stdout
    assert_no_secret(check.stdout)


def test_an_unusable_proxy_for_the_collector_is_reported_in_one_line(tmp_path: Path) -> None:
    settings = {"ONENET_API_KEY": "k", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector.invalid:4318"}
    result = run_cli("run", folder=tmp_path, HTTP_PROXY="http://svc:S3/cret@proxy", **settings)
    assert (result.returncode, result.stdout) == (78, "")
    [line] = result.stderr.splitlines()
    assert_no_secret(line)


def _refuse(sock: socket.socket) -> None:
    sock.recv(65536)
    sock.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_refuses_is_logged_without_its_password(scheme: str, deployment: Deployment) -> None:
    with raw_server(_refuse) as url:
        proxy = url.replace("http://", "http://svc:S3cret@")
        settings = dict.fromkeys(PROXIES, proxy) | {
            "ONENET_URL": f"{scheme}://onenet.invalid",
            "LOG_LEVEL": "debug",
        }
        with deployment.worker(**settings, OTEL_EXPORTER_OTLP_ENDPOINT="http://collector.invalid:4318") as worker:
            deployment.upstream.publish(a_command())
            worker.wait_for("command_retry_scheduled" if scheme == "https" else "command_rejected")
            worker.process.stop()
            assert_no_secret(worker.process.output.read_text())
        declare_on(deployment.upstream.channel, deployment.topology)
        del settings["LOG_LEVEL"]
        check = run_cli(
            "check", folder=deployment.folder, AMQP_URL=deployment.broker_url, ONENET_API_KEY="k", **settings
        )
        assert check.returncode == 1
        assert_no_secret(check.stdout + check.stderr)


def test_an_unreachable_proxy_is_logged_without_its_password(deployment: Deployment) -> None:
    proxy = f"http://svc:S3cret@127.0.0.1:{free_port()}"
    settings = dict.fromkeys(PROXIES, proxy) | {"ONENET_URL": "https://onenet.invalid", "LOG_LEVEL": "debug"}
    with deployment.worker(**settings) as worker:
        deployment.upstream.publish(a_command())
        worker.wait_for("command_retry_scheduled")
        worker.process.stop()
        assert_no_secret(worker.process.output.read_text())


def test_credentials_that_broker_and_store_refuse_are_not_logged(deployment: Deployment, redis_url: str) -> None:
    wrong = deployment.broker_url.replace("guest:guest@", "svc:S3cret@")
    store = redis_url.replace("://", "://svc:S3cret@")
    with deployment.start_worker(AMQP_URL=wrong, IDEMPOTENCY_URL=store, LOG_LEVEL="debug") as worker:
        result = worker.wait_for("broker_unavailable")
        assert result["reason"] == "the broker refused the user name or the password"
        worker.process.stop()
        assert_no_secret(worker.process.output.read_text())
    check = run_cli("check", folder=deployment.folder, AMQP_URL=wrong, IDEMPOTENCY_URL=store, ONENET_API_KEY="k")
    assert check.returncode == 1
    assert_no_secret(check.stdout + check.stderr)


def test_a_missing_vhost_is_reported_without_user_and_vhost(deployment: Deployment) -> None:
    """Where a password is not escaped, a part of it may be taken for the vhost."""
    url = f"{deployment.broker_url}no%2Fvhost?heartbeat=7"
    with deployment.start_worker(AMQP_URL=url) as worker:
        result = worker.wait_for("broker_unavailable")
        worker.process.stop()
        said = worker.process.output.read_text()
    assert result["broker"] == url.replace("guest:guest@", "").partition("/no%2F")[0]
    assert result["reason"] == "the vhost of AMQP_URL does not exist (530 NOT_ALLOWED)"
    for command in ("check", "topology"):
        found = run_cli(command, folder=deployment.folder, AMQP_URL=url, ONENET_API_KEY="k")
        assert found.returncode == 1
        assert "the vhost of AMQP_URL does not exist" in found.stdout + found.stderr
        said += found.stdout + found.stderr
    assert not [part for part in ("guest", "vhost?", "no/vhost", "no%2Fvhost", "heartbeat=7") if part in said]


RAISES = """
from worker.monitor import HealthMonitor
async def fail(monitor):
    raise RuntimeError("cannot use amqp://svc:S3cret@host:5672/prod")
replace(HealthMonitor, "run", fail)
"""


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_the_traceback_of_a_crash_contains_no_user_and_no_password(log_format: str, deployment: Deployment) -> None:
    with deployment.start_worker(**run_at_startup(deployment.folder, RAISES), LOG_FORMAT=log_format) as worker:
        assert worker.process.wait() == 70
        result = worker.process.output.read_text()
    assert "worker_crashed" in result
    assert "amqp://host:5672" in result
    assert "prod" not in result
    assert_no_secret(result)
