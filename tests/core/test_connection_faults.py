"""Why a connection failed, in words for people: the name or the kind of fault, and nothing of a library."""

import errno
import socket
import ssl

import pytest

from worker.core.connection_faults import connection_fault


def _tls(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, f"[SSL: {reason}] some words (_ssl.c:1000)")
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "the name mq.example cannot be resolved"),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
         "the name mq.example cannot be resolved at present: the name server does not answer"),
        (UnicodeError("label too long"), "mq.example is no name of a host"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 1)"),
         "the connection was refused: nothing listens there"),
        (OSError("Multiple exceptions: [Errno 111] Connect call failed, [Errno 111] Connect call failed"),
         "the connection was refused: nothing listens there"),
        (OSError("Multiple exceptions: [Errno 111] Connect call failed, [Errno 101] Connect call failed"),
         "the connection was refused: nothing listens there, there is no route to its network"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
         "the connection was reset by the other side"),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), "no answer in time"),
        (TimeoutError(), "no answer in time"),
        (OSError(errno.EAFNOSUPPORT, "x"), "Address family not supported by protocol"),
        (OSError("the proxy refuses the tunnel: 407"), "the proxy refuses the tunnel: 407"),
        (_tls("WRONG_VERSION_NUMBER"), "this port does not speak TLS"),
        (_tls("TLSV1_ALERT_INTERNAL_ERROR"), "the other side refused TLS: internal error"),
        (_tls("DH_KEY_TOO_SMALL"), "TLS failed: dh key too small"),
        (ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), "the connection was closed in the middle of TLS"),
    ],
    ids=str,
)  # fmt: skip
def test_a_fault_is_said_in_words_for_people(error: BaseException, words: str) -> None:
    assert connection_fault(error, "mq.example") == words
