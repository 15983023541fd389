"""Why a connection could not be made or was lost, in words for people: no library's, and no name of a class."""

import errno
import os
import re
import socket
import ssl
from collections.abc import Mapping
from types import MappingProxyType

_WORDS: Mapping[int, str] = MappingProxyType(
    {
        errno.ECONNREFUSED: "the connection was refused: nothing listens there",
        errno.ECONNRESET: "the connection was reset by the other side",
        errno.ECONNABORTED: "the connection was aborted",
        errno.EPIPE: "the connection was closed by the other side",
        errno.ETIMEDOUT: "no answer in time",
        errno.EHOSTUNREACH: "there is no route to the host",
        errno.ENETUNREACH: "there is no route to its network",
        errno.EMFILE: "this process has too many open files: raise ulimit -n",
        errno.ENFILE: "this machine has too many open files",
    }
)
# Reasons of OpenSSL, by the beginning of their names; the first one that fits is used.
_TLS_WORDS = (
    ("WRONG_VERSION_NUMBER", "this port does not speak TLS"),
    ("HTTP_REQUEST", "this port does not speak TLS"),
    ("UNEXPECTED_EOF", "the connection was closed in the middle of TLS"),
    ("TLSV1_ALERT_PROTOCOL_VERSION", "the two sides have no version of TLS in common"),
    ("UNSUPPORTED_PROTOCOL", "the two sides have no version of TLS in common"),
    ("NO_PROTOCOLS_AVAILABLE", "the two sides have no version of TLS in common"),
    ("SSLV3_ALERT_HANDSHAKE_FAILURE", "the other side refused the handshake: no cipher in common, or no certificate"),
    ("TLSV1_ALERT_UNKNOWN_CA", "the other side does not trust the authority that signed the client certificate"),
    ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "the other side wants a client certificate"),
)
_NO_NAME_SERVER = " at present: the name server does not answer"
_ALERT = re.compile(r"(?:SSLV3|TLSV1|TLSV13)_ALERT_(\w+)")
# asyncio tells of several addresses in one text, "Multiple exceptions: [Errno 111] …, [Errno 101] …", without a number.
_NUMBER = re.compile(r"\[Errno (-?[0-9]+)\]")


def connection_fault(error: BaseException, host: str | None = None) -> str:
    """Return in words why a connection could not be made, or was lost.

    Args:
        error: of the operating system, of TLS, or of the look-up of a name; of any other its text is used.
        host: the name that was looked up.
    """
    if isinstance(error, socket.gaierror):
        name = "the host's name" if host is None else f"the name {host}"
        return f"{name} cannot be resolved" + _NO_NAME_SERVER * (error.errno == socket.EAI_AGAIN)
    if isinstance(error, UnicodeEncodeError) and error.encoding == "latin-1":
        return "a header holds a character that it cannot carry"
    if isinstance(error, UnicodeError):
        return "the host's name is none that can be looked up" if host is None else f"{host} is no name of a host"
    if isinstance(error, ssl.SSLError):
        return _tls_fault(error)
    if isinstance(error, OSError):
        return _system_fault(error)
    return str(error) or "the reason is not known"


def _tls_fault(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {getattr(error, 'verify_message', error.args[-1])}"
    reason = getattr(error, "reason", None) or ""  # only errors of OpenSSL have one
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        reason = "UNEXPECTED_EOF"
    for beginning, words in _TLS_WORDS:
        if reason.startswith(beginning):
            return words
    if alert := _ALERT.fullmatch(reason):
        return f"the other side refused TLS: {alert[1].lower().replace('_', ' ')}"
    return f"TLS failed: {reason.lower().replace('_', ' ')}" if reason else "TLS failed"


def _system_fault(error: OSError) -> str:
    numbers = [error.errno] if error.errno is not None else [int(found) for found in _NUMBER.findall(str(error))]
    words = dict.fromkeys(_WORDS.get(number) or os.strerror(number) for number in numbers)
    if words:
        return ", ".join(words)
    if str(error):
        return str(error)  # of this program
    return "no answer in time" if isinstance(error, TimeoutError) else "the reason is not known"
