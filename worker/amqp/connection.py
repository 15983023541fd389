"""Connection parameters, and awaitable connections and channels: pika's callbacks turned into futures."""

import asyncio
import re
import ssl
from typing import Any
from urllib.parse import quote

from pika import URLParameters
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.connection import SSLOptions
from pika.exceptions import AMQPError, IncompatibleProtocolError, ProbableAuthenticationError

from worker.amqp.asyncio_io import AsyncioIOServices
from worker.errors import BrokerUnavailable, SettingsError
from worker.settings import Settings

HEARTBEAT_S = 15  # the documented good range is 5 to 20; the default would find a lost peer after minutes
CONNECT_S = 10
# Of a TLS error that comes after the handshake pika hands on its text only, which is read for people, never to decide.
_TLS_TROUBLE = {
    "ALERT_CERTIFICATE_REQUIRED": "the broker wants a client certificate: AMQP_CERT_FILE, AMQP_KEY_FILE",
    "ALERT_UNKNOWN_CA": "the broker does not know the authority that signed the client certificate, AMQP_CERT_FILE",
    "WRONG_VERSION_NUMBER": "no TLS is spoken on this port: it wants amqp://, or amqps:// another port",
}
# What pika raises for an option of a URL, of which some are Python literals and some are files. Its words quote it.
_UNUSABLE = (ValueError, TypeError, AttributeError, KeyError, SyntaxError, RecursionError, MemoryError, OSError)
_BROKERS_USER = re.compile(r"\buser (?:was )?\\?'.*'")
CALL_S = 20  # for one answer of the broker; a declaration of many queues on a busy node takes its time


def connection_parameters(
    settings: Settings,
) -> list[URLParameters]:
    """Return what each of the broker's URLs says, with this worker's time limits.

    Raises:
        SettingsError: a URL, or one of the files for TLS, cannot be used.
    """
    found = []
    for url in settings.amqp_url:
        try:
            parameters = URLParameters(url.get_secret_value())
        except _UNUSABLE as exc:
            raise SettingsError([f"AMQP_URL: an option after ? cannot be used: {type(exc).__name__}"]) from exc
        parameters.heartbeat = parameters.heartbeat or HEARTBEAT_S
        parameters.blocked_connection_timeout = None  # an alarm lasts as long as it lasts: wait, stay live
        parameters.socket_timeout = CONNECT_S / 2
        parameters.stack_timeout = CONNECT_S
        parameters.connection_attempts = 1
        if parameters.ssl_options is not None:
            parameters.ssl_options = _tls(parameters.host, settings)
        found.append(parameters)
    return found


def _tls(host: str, settings: Settings) -> SSLOptions:
    ca_file, cert_file, key_file = settings.amqp_ca_file, settings.amqp_cert_file, settings.amqp_key_file
    context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
    if cert_file is not None and key_file is not None:
        try:
            context.load_cert_chain(cert_file, key_file)
        except (OSError, ssl.SSLError) as exc:
            raise SettingsError([f"AMQP_CERT_FILE, AMQP_KEY_FILE: cannot be used: {exc}"]) from exc
    return SSLOptions(context, host)


def address(parameters: URLParameters) -> str:
    """Name a broker by what of its URL may be printed: host, port and vhost."""
    scheme = "amqp" if parameters.ssl_options is None else "amqps"
    host = f"[{parameters.host}]" if ":" in parameters.host else parameters.host
    vhost = "" if parameters.virtual_host == "/" else quote(parameters.virtual_host, safe="")
    return f"{scheme}://{host}:{parameters.port}/{vhost}"


def without_user(text: str) -> str:
    """Return the broker's words without the user name that it quotes: it is a part of a URL that is a secret."""
    return _BROKERS_USER.sub("this user", text)


async def connect(parameters: URLParameters, name: str, streams: AsyncioIOServices) -> AsyncioConnection:
    """Open one connection.

    Args:
        parameters: the broker.
        name: shown in the broker's list of connections.
        streams: the connection's input and output, of this connection alone.

    Raises:
        BrokerUnavailable: it could not be opened in time.
    """
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[None] = loop.create_future()

    def on_open(_connection: Any) -> None:
        if not opened.done():
            opened.set_result(None)

    def on_error(_connection: Any, error: BaseException | str) -> None:
        if not opened.done():
            opened.set_exception(BrokerUnavailable(reason_of(error, parameters)))

    parameters.client_properties = {"connection_name": name, "product": "onenet-execute-worker"}
    connection = AsyncioConnection(
        parameters, on_open_callback=on_open, on_open_error_callback=on_error, custom_ioloop=streams
    )
    try:
        async with asyncio.timeout(CONNECT_S + 5):
            await opened
    except TimeoutError as exc:
        raise BrokerUnavailable(f"no connection within {CONNECT_S} s") from exc
    finally:
        if not opened.done() or opened.cancelled() or opened.exception() is not None:
            close(connection)
    return connection


def close(connection: AsyncioConnection) -> None:
    """Begin to close a connection, in whatever state it is."""
    if not (connection.is_closed or connection.is_closing):
        connection.close()


def reason_of(error: BaseException | str, parameters: URLParameters | None = None) -> str:
    """Say in one line why a connection was lost or, with its parameters, could not be opened.

    It is the innermost cause, without the libraries' wrapping.
    """
    if isinstance(error, ProbableAuthenticationError):
        return "the broker refused the user name or the password"
    inner: Any = error
    while True:
        causes = getattr(inner, "exceptions", None) or [getattr(inner, "exception", None)]
        if causes[-1] is None and isinstance(inner, AMQPError) and inner.args:
            causes = [inner.args[-1]]
        if not isinstance(causes[-1], BaseException):
            break
        inner = causes[-1]
    if isinstance(inner, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {inner.verify_message}"
    for code, meaning in _TLS_TROUBLE.items():
        if code in str(inner):
            return meaning
    if isinstance(inner, IncompatibleProtocolError) and parameters is not None:
        # A client certificate is judged after the handshake of TLS 1.3; the verdict may be lost with the connection.
        is_tls = parameters.ssl_options is not None
        question = "does it take the client certificate" if is_tls else "is it a port for TLS, amqps://"
        return f"the connection ended before AMQP began; {question}? {inner.args[-1]}"
    return without_user(f"{type(inner).__name__}: {inner}") if str(inner) else type(inner).__name__
