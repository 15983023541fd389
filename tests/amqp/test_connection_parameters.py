"""What becomes of files for TLS that cannot be used: one line, and no question at the terminal."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from pydantic import SecretStr

from tests.support.certificates import Authority, Certificate
from worker.amqp.address import BrokerAddress
from worker.amqp.connection import connection_parameters
from worker.errors import SettingsError

URL = SecretStr("amqps://guest:guest@127.0.0.1/")


@pytest.fixture
def certificate(authority: Authority, tmp_path: Path) -> Certificate:
    return authority.issue("worker", tmp_path / "worker")


def test_an_encrypted_key_is_one_line(certificate: Certificate, tmp_path: Path) -> None:
    """OpenSSL would ask for its passphrase at the terminal, and wait."""
    key = load_pem_private_key(certificate.key.read_bytes(), None)
    encrypted = tmp_path / "encrypted.pem"
    encrypted.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))
    with pytest.raises(SettingsError) as raised:
        connection_parameters(BrokerAddress([URL], certificate.ca, certificate.cert, encrypted))
    [line] = raised.value.lines
    assert "AMQP_KEY_FILE" in line
    assert "encrypted" in line


@pytest.mark.parametrize("name", ["missing.pem", "no/folder.pem", "."])
def test_authorities_that_cannot_be_read_are_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError) as raised:
        connection_parameters(BrokerAddress([URL], tmp_path / name))
    [line] = raised.value.lines
    assert line.startswith("AMQP_CA_FILE: cannot be used")


def test_certificates_are_read_anew_for_each_connection(certificate: Certificate, tmp_path: Path) -> None:
    address = BrokerAddress([URL], certificate.ca, certificate.cert, certificate.key)
    connection_parameters(address)
    certificate.cert.write_text("renewed, but cut off")
    with pytest.raises(SettingsError):
        connection_parameters(address)


def test_a_heartbeat_that_amqp_cannot_say_is_refused() -> None:
    with pytest.raises(SettingsError, match="AMQP_URL: heartbeat: must be a number of seconds up to 65535"):
        connection_parameters(BrokerAddress([SecretStr("amqp://host/?heartbeat=70000")]))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("heartbeat=soon", "heartbeat"),
        ("frame_max=131072&tcp_options=3", "tcp_options"),
        ("client_properties=%7B", "client_properties"),
        ("pass=word@host", "its name is unknown"),  # of a password with an unescaped question mark
    ],
)
def test_an_option_that_cannot_be_used_is_named_unless_it_may_be_a_secret(options: str, named: str) -> None:
    with pytest.raises(SettingsError) as raised:
        connection_parameters(BrokerAddress([SecretStr(f"amqp://host/?{options}")]))
    assert raised.value.lines == [f"AMQP_URL: an option after ? cannot be used: {named}"]
