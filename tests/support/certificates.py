"""Certificates of private authorities, issued for each run."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certificate:
    """A folder with a certificate, its key and its authority."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def cert(self) -> Path:
        return self.folder / "cert.pem"

    @property
    def key(self) -> Path:
        return self.folder / "key.pem"


class Authority:
    """A private certificate authority."""

    def __init__(self) -> None:
        self._authority = trustme.CA()

    def issue(self, name: str, folder: Path, *, is_expired: bool = False) -> Certificate:
        """Issue a certificate for one host name or address into a new folder."""
        now = datetime.now(UTC)
        period = (now - timedelta(days=2), now - timedelta(days=1)) if is_expired else (None, None)
        issued = self._authority.issue_cert(name, not_before=period[0], not_after=period[1])
        folder.mkdir()
        found = Certificate(folder)
        self._authority.cert_pem.write_to_path(str(found.ca))
        issued.cert_chain_pems[0].write_to_path(str(found.cert))
        issued.private_key_pem.write_to_path(str(found.key))
        return found
