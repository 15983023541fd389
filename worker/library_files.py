"""The files that variables of libraries name, checked before a library opens them.

A library waits for the writer of a FIFO, reads /dev/zero without end, and asks for the passphrase of an encrypted key.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from worker.settings_files import UnusableFile, check_certificates, check_private_key, check_writable, read_text


def library_file_faults(*, exports_spans: bool) -> list[str]:
    """Return a line for each variable that is set and names a file that cannot be used.

    Args:
        exports_spans: whether a collector of spans is set; without one nothing opens the files of its exporter.
    """
    checks = {**_ALWAYS, **_EXPORTER} if exports_spans else _ALWAYS
    faults = []
    for name, check in checks.items():
        if value := os.environ.get(name):
            try:
                check(Path(value))
            except UnusableFile as exc:
                faults.append(f"{name}: {exc}")
    return faults


def _check_bundle(path: Path) -> None:
    """Check that there are certificates of authorities: in a file, or in a folder with a file for each.

    Raises:
        UnusableFile: there are none, or they cannot be read.
    """
    if not path.is_dir():
        check_certificates(path)


def _check_folder(path: Path) -> None:
    """Check that files can be made in a folder.

    Raises:
        UnusableFile: they cannot.
    """
    if not (path.is_dir() and os.access(path, os.W_OK)):
        raise UnusableFile("is not a directory that can be written", path)


_Checks = Mapping[str, Callable[[Path], object]]
_ALWAYS: _Checks = MappingProxyType(
    {
        "SSL_CERT_FILE": check_certificates,  # OpenSSL, for the broker and Redis
        "SSLKEYLOGFILE": check_writable,  # each context of TLS
        "PROMETHEUS_MULTIPROC_DIR": _check_folder,
        "prometheus_multiproc_dir": _check_folder,
    }
)
_EXPORTER: _Checks = MappingProxyType(
    {
        "OTEL_EXPORTER_OTLP_CERTIFICATE": _check_bundle,
        "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE": _check_bundle,
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": check_certificates,
        "OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE": check_certificates,
        "OTEL_EXPORTER_OTLP_CLIENT_KEY": check_private_key,
        "OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY": check_private_key,
        "REQUESTS_CA_BUNDLE": _check_bundle,  # for the platform they are checked with its route, which may not use TLS
        "CURL_CA_BUNDLE": _check_bundle,
        "NETRC": read_text,
    }
)
