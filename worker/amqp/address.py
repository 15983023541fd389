"""Where the broker is, and with which certificates it is reached; nothing of pika, so that settings can say it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """The broker's URLs and the files for TLS.

    Args:
        urls: ``amqp://`` or ``amqps://``, tried in turn; secrets, since they contain passwords.
        ca_file: the authority that signed the broker's certificate; None: the system's authorities.
        cert_file: the client certificate, None for none.
        key_file: the key of the client certificate.
    """

    urls: Sequence[SecretStr]
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
