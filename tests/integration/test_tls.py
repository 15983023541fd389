"""TLS to the broker and to the platform with private certificate authorities; verification is never skipped."""

import ssl
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.builders import a_command
from tests.support.certificates import Authority, Certificate
from tests.support.command_line import TARGET_OPTIONS, run_cli
from tests.support.deployment import Deployment
from tests.support.proxies import Proxy, raw_server
from tests.support.simulator import onenet
from tests.support.startup_code import run_at_startup
from worker.dev.services.broker import LocalBroker

pytestmark = pytest.mark.broker_version

Trust = Callable[[Certificate, Path], dict[str, str]]


class Certificates(NamedTuple):
    """The certificates that a client may use: of the broker's authority, and of a foreign one."""

    ours: Certificate
    foreign: Certificate


@pytest.fixture
def certificates(authority: Authority, tmp_path: Path) -> Certificates:
    return Certificates(
        authority.issue("worker", tmp_path / "ours"),
        Authority().issue("worker", tmp_path / "foreign"),
    )


def amqp_settings(url: str, trusted: Certificate, shown: Certificate) -> dict[str, str]:
    return {
        "AMQP_URL": url,
        "AMQP_CA_FILE": str(trusted.ca),
        "AMQP_CERT_FILE": str(shown.cert),
        "AMQP_KEY_FILE": str(shown.key),
    }


@pytest.fixture
def secured(own_broker: LocalBroker, tmp_path: Path) -> Iterator[Deployment]:
    """A deployment on a broker whose TLS port requires a client certificate."""
    with onenet() as simulator, Deployment.set_up(own_broker.url, tmp_path, simulator) as deployment:
        yield deployment


@pytest.fixture
def tls_url(own_broker: LocalBroker) -> Iterator[str]:
    """The URL of the broker's TLS port at 127.0.0.1, the address in its certificate."""
    proxy = Proxy(own_broker.tls_url)
    yield proxy.url
    proxy.close()


def test_worker_and_command_line_connect_with_a_trusted_authority_and_a_client_certificate(
    secured: Deployment, tls_url: str, certificates: Certificates, tmp_path: Path
) -> None:
    settings = amqp_settings(tls_url, certificates.ours, certificates.ours)
    with secured.worker(**settings) as worker:
        assert worker.wait_for("broker_connected")["broker"].startswith("amqps://")
        secured.upstream.publish(a_command())
        assert secured.upstream.reply().json["status"] == "accepted"
        namespace = {"WORKER_NAMESPACE": secured.topology.namespace}
        sent = run_cli("send", *TARGET_OPTIONS, "--wait", folder=tmp_path, **settings, **namespace)
        assert sent.returncode == 0, sent.stderr


def assert_refused(deployment: Deployment, settings: Mapping[str, str], reason: str) -> None:
    """Check that worker and command line report the reason, and that neither connects; the worker keeps trying."""
    patient = run_at_startup(deployment.folder, "import worker.amqp.broker\nworker.amqp.broker.CONNECT_S = 60\n")
    with deployment.start_worker(**settings, **patient) as worker:
        worker.wait_for("broker_unavailable", count=2)
        failures = [event for event in worker.events if event["event"] == "broker_unavailable"]
        assert all(reason in event["reason"] for event in failures), failures
        assert not [event for event in worker.events if event["event"] == "broker_connected"]
        assert worker.process.is_running
    topology = run_cli("topology", folder=deployment.folder, **settings)
    assert topology.returncode == 1
    [line] = topology.stderr.splitlines()
    assert reason in line
    assert "Traceback" not in line


def test_a_broker_certificate_of_another_authority_is_refused(
    secured: Deployment, tls_url: str, certificates: Certificates
) -> None:
    settings = amqp_settings(tls_url, certificates.foreign, certificates.ours)
    assert_refused(secured, settings, "certificate verify failed: self-signed certificate in certificate chain")


def test_a_broker_certificate_for_another_host_name_is_refused(
    secured: Deployment, tls_url: str, certificates: Certificates
) -> None:
    url = tls_url.replace("127.0.0.1", "localhost")
    settings = amqp_settings(url, certificates.ours, certificates.ours)
    assert_refused(secured, settings, "certificate verify failed: Hostname mismatch")


def test_an_expired_broker_certificate_is_refused(
    secured: Deployment, authority: Authority, certificates: Certificates, tmp_path: Path
) -> None:
    """The handshake fails before AMQP begins, so any TLS server will do."""
    expired = authority.issue("127.0.0.1", tmp_path / "expired", is_expired=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(expired.cert, expired.key)
    with raw_server(lambda sock: context.wrap_socket(sock, server_side=True).close()) as url:
        settings = amqp_settings(url.replace("http:", "amqps:"), certificates.ours, certificates.ours)
        assert_refused(secured, settings, "certificate verify failed: certificate has expired")


def test_a_missing_client_certificate_is_reported(
    secured: Deployment, tls_url: str, certificates: Certificates
) -> None:
    """The broker's TLS alert may be lost with the connection, so the worker adds a hint of its own."""
    settings = {"AMQP_URL": tls_url, "AMQP_CA_FILE": str(certificates.ours.ca)}
    assert_refused(secured, settings, "client certificate")


def test_a_client_certificate_of_another_authority_is_reported(
    secured: Deployment, tls_url: str, certificates: Certificates
) -> None:
    settings = amqp_settings(tls_url, certificates.ours, certificates.foreign)
    assert_refused(secured, settings, "client certificate")


def test_a_plain_connection_to_a_tls_port_is_reported(
    secured: Deployment, tls_url: str, certificates: Certificates
) -> None:
    settings = amqp_settings(tls_url.replace("amqps:", "amqp:"), certificates.ours, certificates.ours)
    assert_refused(secured, settings, "is it a port for TLS, amqps://?")


def test_a_tls_connection_to_a_plain_port_is_reported(secured: Deployment, certificates: Certificates) -> None:
    settings = amqp_settings(secured.broker_url.replace("amqp:", "amqps:"), certificates.ours, certificates.ours)
    assert_refused(secured, settings, "this port does not speak TLS")


def test_a_platform_certificate_of_a_private_authority_is_accepted(deployment: Deployment, tmp_path: Path) -> None:
    certificate = Authority().issue("127.0.0.1", tmp_path / "platform")
    with onenet(certificate=certificate) as platform:
        with deployment.worker(ONENET_URL=platform.url, ONENET_CA_FILE=str(certificate.ca)):
            deployment.upstream.publish(a_command())
            assert deployment.upstream.reply().json["status"] == "accepted"
        assert len(platform.platform.commands) == 1


def trusts_another(certificate: Certificate, tmp_path: Path) -> dict[str, str]:
    return {"ONENET_CA_FILE": str(Authority().issue("127.0.0.1", tmp_path / "another").ca)}


def trusts_another_but_the_environment_does_not(certificate: Certificate, tmp_path: Path) -> dict[str, str]:
    """The variables that requests and OpenSSL read add nothing to ONENET_CA_FILE."""
    environment = dict.fromkeys(("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"), str(certificate.ca))
    return environment | trusts_another(certificate, tmp_path)


def trusts_the_usual_ones(certificate: Certificate, tmp_path: Path) -> dict[str, str]:
    return {}


def trusts_it(certificate: Certificate, tmp_path: Path) -> dict[str, str]:
    return {"ONENET_CA_FILE": str(certificate.ca)}


@pytest.mark.parametrize(
    ("name", "is_expired", "trust", "reason"),
    [
        ("127.0.0.1", False, trusts_another, "unable to get local issuer certificate"),
        ("127.0.0.1", False, trusts_another_but_the_environment_does_not, "unable to get local issuer certificate"),
        ("127.0.0.1", False, trusts_the_usual_ones, "unable to get local issuer certificate"),
        ("localhost", False, trusts_it, "certificate is not valid for '127.0.0.1'"),
        ("127.0.0.1", True, trusts_it, "certificate has expired"),
    ],
    ids=["another", "another-environment", "usual", "name", "expired"],
)
def test_no_request_is_sent_to_a_platform_with_an_untrusted_certificate(
    deployment: Deployment, tmp_path: Path, name: str, is_expired: bool, trust: Trust, reason: str
) -> None:
    """The handshake precedes the request, so the command is known not to have been sent, and is not in doubt."""
    certificate = Authority().issue(name, tmp_path / "platform", is_expired=is_expired)
    with onenet(certificate=certificate) as platform:
        settings = trust(certificate, tmp_path)
        with deployment.worker(ONENET_URL=platform.url, WORKER_MAX_ATTEMPTS="2", **settings) as worker:
            deployment.upstream.publish(a_command())
            error = deployment.upstream.reply().json["error"]
            worker.wait_for("command_retry_scheduled")
            events = [event["event"] for event in worker.events]
        assert error["code"] == "retries_exhausted"
        assert "certificate verify failed: " in error["message"]
        assert reason in error["message"]
        assert "command_in_doubt" not in events
        assert not platform.requests


def test_an_unencrypted_platform_url_logs_one_warning_at_start(deployment: Deployment) -> None:
    with deployment.worker(ONENET_URL="http://onenet.invalid:8080/base", ONENET_API_KEY="aSecret") as worker:
        [warning] = [event for event in worker.events if event["event"] == "onenet_url_not_encrypted"]
        assert (warning["level"], warning["host"]) == ("warning", "onenet.invalid")
        assert "aSecret" not in worker.process.output.read_text()


def test_an_unencrypted_platform_url_on_this_machine_logs_no_warning(deployment: Deployment) -> None:
    with deployment.worker() as worker:
        assert "onenet_url_not_encrypted" not in [event["event"] for event in worker.events]
