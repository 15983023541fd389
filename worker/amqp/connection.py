"""Connection parameters, awaitable connections, and the reasons for which they are lost."""

import asyncio
import builtins
import re
import ssl
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit, urlunsplit

from pika import URLParameters
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.adapters.utils.connection_workflow import AMQPConnectorStackTimeout
from pika.connection import SSLOptions
from pika.exceptions import (
    AMQPError,
    AMQPHeartbeatTimeout,
    AuthenticationError,
    ChannelClosedByBroker,
    ChannelWrongStateError,
    ConnectionBlockedTimeout,
    ConnectionClosedByBroker,
    ConnectionWrongStateError,
    IncompatibleProtocolError,
    NoFreeChannels,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
    ProtocolSyntaxError,
    StreamLostError,
)

from worker.amqp.address import BrokerAddress
from worker.amqp.asyncio_io import AsyncioIOServices
from worker.amqp.field_table import preserve_raw_values
from worker.amqp.refusals import refusal
from worker.core.connection_faults import connection_fault
from worker.errors import BrokerUnavailable, SettingsError, UserRefused

HEARTBEAT_S = 15  # the documented good range is 5 to 20; with the default a lost peer is noticed after minutes
_MAX_HEARTBEAT_S = 65535  # two bytes in AMQP
CONNECT_S = 5  # from the TCP connection to an open AMQP connection
CALL_S = 60  # for one reply of the broker: a cluster that has lost a node takes long for some (measured)
# Of a TLS error after the handshake pika passes on the text only: it chooses the words of a message, and no behaviour.
_TLS_ERRORS = {
    "ALERT_CERTIFICATE_REQUIRED": "the broker wants a client certificate: AMQP_CERT_FILE, AMQP_KEY_FILE",
    "ALERT_UNKNOWN_CA": "the broker does not trust the authority that signed the client certificate, AMQP_CERT_FILE",
    "WRONG_VERSION_NUMBER": "this port does not speak TLS: use amqp://, or another port with amqps://",
}
# What pika raises for an unusable option of a URL: some are Python literals, some name files. Its messages quote the
# value, which may be a secret, so they are not passed on.
_OPTIONS = {
    "channel_max",
    "client_properties",
    "connection_attempts",
    "frame_max",
    "heartbeat",
    "locale",
    "retry_delay",
    "tcp_options",
}
_OPTION_ERRORS = (ValueError, TypeError, AttributeError, KeyError, SyntaxError, RecursionError, MemoryError, OSError)
_REFUSALS = (AuthenticationError, ProbableAccessDeniedError, ProbableAuthenticationError)
ALARM = "the broker takes nothing from publishers, because its memory or its disk is short"
ALARM_REMEDY = "rabbitmq-diagnostics alarms tells which"
_NOT_AMQP = "the other side does not speak AMQP 0-9-1"
# Of a refusal while a connection is opened pika keeps the text only: it chooses words, and no behaviour.
_CLOSED_BY_BROKER = re.compile(r"\((\d{3})\) (['\"])(.*)\2")
_STREAM_LOST = re.compile(r"Stream connection lost: (?P<error>(?P<kind>\w+)\((?:(?P<number>[0-9]+), )?.*)", re.DOTALL)


class NoAnswer(AMQPError):
    """The broker has not answered a request within so many seconds."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"no answer from the broker within {limit_s:g} s")


_FAULTS: tuple[tuple[type[BaseException], str], ...] = (
    (AMQPHeartbeatTimeout, "missed heartbeats: the broker did not answer in time"),
    (AMQPConnectorStackTimeout, "no answer in time"),
    (AuthenticationError, "the broker offers no way to log in with a user name and a password"),
    (ChannelWrongStateError, "the channel is closed"),
    (ConnectionBlockedTimeout, f"{ALARM}: {ALARM_REMEDY}"),
    (ConnectionWrongStateError, "the connection is closed"),
    (NoFreeChannels, "the broker allows no further channel on this connection"),
    (ProbableAccessDeniedError, "the broker refused this user in the vhost of AMQP_URL"),
    (ProtocolSyntaxError, _NOT_AMQP),
    (IncompatibleProtocolError, _NOT_AMQP),
)


def connection_parameters(broker: BrokerAddress) -> list[URLParameters]:
    """Return the parameters of each of the broker's URLs, with this worker's time limits.

    Raises:
        SettingsError: a URL, or one of the files for TLS, cannot be used.
    """
    found = []
    for url in broker.urls:
        if "ssl_options" in parse_qs(urlsplit(url.get_secret_value()).query, keep_blank_values=True):
            reason = "ssl_options: set AMQP_CA_FILE, AMQP_CERT_FILE and AMQP_KEY_FILE instead"
            raise SettingsError([f"AMQP_URL: an option after ? cannot be used: {reason}"])
        try:
            parameters = URLParameters(url.get_secret_value())
        except _OPTION_ERRORS as exc:
            option = _unusable_option(url.get_secret_value())
            raise SettingsError([f"AMQP_URL: an option after ? cannot be used: {option}"]) from exc
        if isinstance(parameters.heartbeat, int) and parameters.heartbeat > _MAX_HEARTBEAT_S:
            raise SettingsError([f"AMQP_URL: heartbeat: must be a number of seconds up to {_MAX_HEARTBEAT_S}"])
        parameters.heartbeat = parameters.heartbeat or HEARTBEAT_S
        parameters.blocked_connection_timeout = None  # an alarm has no time limit: wait, and stay live
        parameters.socket_timeout = parameters.stack_timeout = CONNECT_S
        parameters.connection_attempts = 1
        if parameters.ssl_options is not None:
            parameters.ssl_options = _tls(parameters.host, broker)
        found.append(parameters)
    return found


def _unusable_option(url: str) -> str:
    """Return the name of the first option of a URL that pika refuses; an unknown name may be a part of a password."""
    parts = urlsplit(url)
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        try:
            URLParameters(urlunsplit(parts._replace(query=urlencode({name: value}))))
        except _OPTION_ERRORS:
            return name if name in _OPTIONS else "its name is unknown"
    return "it cannot be read"


def _tls(host: str, broker: BrokerAddress) -> SSLOptions:
    try:
        context = ssl.create_default_context(cafile=None if broker.ca_file is None else str(broker.ca_file))
    except OSError as exc:  # ssl.SSLError is one
        raise SettingsError([f"AMQP_CA_FILE: cannot be used: {_file_fault(exc)} ({broker.ca_file})"]) from exc
    if broker.cert_file is not None and broker.key_file is not None:
        try:
            context.load_cert_chain(broker.cert_file, broker.key_file, password=_refuse_passphrase)
        except _KeyEncrypted as exc:
            reason = "the private key is encrypted, and the worker cannot ask for its passphrase"
            raise SettingsError([f"AMQP_KEY_FILE: cannot be used: {reason}"]) from exc
        except OSError as exc:
            files = f"{broker.cert_file}, {broker.key_file}"
            raise SettingsError(
                [f"AMQP_CERT_FILE, AMQP_KEY_FILE: cannot be used: {_file_fault(exc)} ({files})"]
            ) from exc
    return SSLOptions(context, host)


def _file_fault(error: OSError) -> str:
    """Return why a file with certificates or a key cannot be used."""
    if not isinstance(error, ssl.SSLError):
        return error.strerror or "it cannot be read"
    return (
        "the key is not that of the certificate"
        if error.reason == "KEY_VALUES_MISMATCH"
        else "it cannot be read as PEM"
    )


class _KeyEncrypted(Exception):
    """The private key needs a passphrase."""


def _refuse_passphrase() -> str:
    """Called by OpenSSL for an encrypted key; without it OpenSSL would ask for the passphrase at the terminal."""
    raise _KeyEncrypted


def printable_address(parameters: URLParameters) -> str:
    """Return scheme, host and port of the broker's URL; its other parts may be secrets, or parts of one."""
    scheme = "amqp" if parameters.ssl_options is None else "amqps"
    host = f"[{parameters.host}]" if ":" in parameters.host else parameters.host
    return f"{scheme}://{host}:{parameters.port}"


async def connect(parameters: URLParameters, name: str, io: AsyncioIOServices) -> AsyncioConnection:
    """Open one connection.

    Args:
        parameters: the broker.
        name: of the connection, in the broker's list of connections.
        io: the connection's input and output; each connection needs its own.

    Raises:
        BrokerUnavailable: it did not open within the parameters' ``stack_timeout``, or the broker refused the user.
    """
    preserve_raw_values()
    opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_open(_connection: Any) -> None:
        if not opened.done():
            opened.set_result(None)

    def on_error(_connection: Any, error: BaseException | str) -> None:
        if not opened.done():
            is_refused = any(isinstance(cause, _REFUSALS) for cause in _causes(error))
            kind = UserRefused if is_refused else BrokerUnavailable
            opened.set_exception(kind(reason_of(error, parameters)))

    io.on_fault = lambda error: on_error(None, error)
    parameters.client_properties = {"connection_name": name, "product": "onenet-execute-worker"}
    connection = AsyncioConnection(
        parameters, on_open_callback=on_open, on_open_error_callback=on_error, custom_ioloop=io
    )
    is_wanted = False
    try:
        async with asyncio.timeout(parameters.stack_timeout):
            await opened
        is_wanted = True
    except TimeoutError as exc:
        raise BrokerUnavailable(f"no answer within {parameters.stack_timeout:g} s") from exc
    finally:
        if not is_wanted:  # it failed, or the caller was cancelled, perhaps just when it had opened
            abandon(connection, io)
    return connection


def abandon(connection: AsyncioConnection, io: AsyncioIOServices) -> None:
    """Begin to close a connection in any state, without waiting until it is closed."""
    if connection.is_closed or connection.is_closing:
        return
    if io.is_pairing:
        asyncio.get_running_loop().call_soon(abandon, connection, io)
    elif not io.is_connected:
        io.drop()
    elif connection.is_open:
        connection.close()
    else:  # pika cannot close a connection during its handshake: it takes a class for an error, and fails (1.4.4)
        io.abort()


def reason_of(error: BaseException | str, parameters: URLParameters | None = None) -> str:
    """Return in one line, and in words for people, why a connection was lost or a channel closed.

    This is the innermost cause, without the exceptions that the libraries wrap around it.

    Args:
        error: of pika, of the operating system, or of TLS.
        parameters: of a connection that could not be opened.
    """
    if isinstance(error, ProbableAuthenticationError):
        return "the broker refused the user name or the password"
    inner: Any = _causes(error)[-1]
    if isinstance(inner, NoAnswer):
        return str(inner)
    if isinstance(inner, ConnectionClosedByBroker | ChannelClosedByBroker):
        return refusal(inner.reply_code, inner.reply_text)
    if isinstance(inner, ProbableAccessDeniedError) and (found := _CLOSED_BY_BROKER.search(str(inner))):
        return refusal(int(found[1]), found[3])
    for code, meaning in _TLS_ERRORS.items():
        if code in str(inner):
            return meaning
    if isinstance(inner, IncompatibleProtocolError) and parameters is not None:
        # TLS 1.3 checks the client certificate after the handshake; the alert may be lost with the connection.
        is_tls = parameters.ssl_options is not None
        question = "does it accept the client certificate" if is_tls else "is it a port for TLS, amqps://"
        return f"the connection ended before AMQP began; {question}?"
    for kind, words in _FAULTS:
        if isinstance(inner, kind):
            return words
    if isinstance(inner, StreamLostError):
        return _stream_fault(str(inner))
    if isinstance(inner, OSError | UnicodeError):
        return connection_fault(inner, None if parameters is None else parameters.host)
    return "the reason is not known"


def _stream_fault(text: str) -> str:
    """Return why an open connection was lost, of which pika keeps the text of the error only."""
    found = _STREAM_LOST.match(text)
    if found is None:
        return "the other side closed the connection"
    kind = getattr(builtins, found["kind"], None)
    if isinstance(kind, type) and issubclass(kind, OSError):
        return connection_fault(OSError(int(found["number"] or 0), "") if found["number"] else kind())
    return f"an error that was not expected: {found['error']}"  # of this program, which must be seen


def _causes(error: BaseException | str) -> list[BaseException | str]:
    """Return an error and the one that it wraps, down to the innermost."""
    found = [error]
    while True:
        inner: Any = found[-1]
        causes = getattr(inner, "exceptions", None) or [getattr(inner, "exception", None)]
        if causes[-1] is None and isinstance(inner, AMQPError) and inner.args:
            causes = [inner.args[-1]]
        if not isinstance(causes[-1], BaseException):
            return found
        found.append(causes[-1])
