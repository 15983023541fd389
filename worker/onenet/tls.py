"""One layer of TLS between a transport and a protocol; a second layer may lie on top of it, within a proxy's TLS.

asyncio's own layer does not show whether half a record has arrived, which would be taken for the next response, and
in TLS within TLS it fails when the inner handshake does.
"""

import asyncio
import ssl

_CHUNK_BYTES = 4 * 1024
_HEADER_BYTES = 5  # of a record: its type, the version, and the length of what follows. Source: RFC 8446, section 5.1


class BufferedReader(asyncio.BufferedProtocol, asyncio.Protocol):
    """Reads into a buffer of its own: asyncio allocates 256 KiB for each read, 13 µs of the 33 of a request."""

    def __init__(self) -> None:
        super().__init__()
        self._buffer = memoryview(bytearray(_CHUNK_BYTES))

    def get_buffer(self, _sizehint: int, /) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self._buffer[:nbytes]))


class TLSLayer(BufferedReader, asyncio.Transport):
    """A protocol for the transport below, and a transport for the protocol above, which it calls once it is secure.

    Args:
        context: which certificates are trusted.
        name: the name that the server's certificate must have.
        upper: the protocol above.
    """

    def __init__(self, context: ssl.SSLContext, name: str, upper: asyncio.Protocol) -> None:
        super().__init__()
        self._upper = upper
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        self._secured: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lower: asyncio.Transport | None = None
        self._error: Exception | None = None
        self._is_secure = False
        self._unfinished = b""  # the beginning of a record

    @property
    def has_part_of_a_record(self) -> bool:
        """Whether bytes have arrived that cannot be decrypted yet. OpenSSL has taken them, and does not tell."""
        return bool(self._unfinished)

    async def secured(self) -> None:
        """Wait until the connection is secure.

        Raises:
            OSError: the handshake failed.
        """
        await self._secured

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol)
        self._upper = protocol

    def write(self, data: bytes | bytearray | memoryview) -> None:
        try:
            self._tls.write(data)
        except ssl.SSLError as exc:
            self._fail(exc)
        self._flush()

    def abort(self) -> None:
        if self._lower is not None:
            self._lower.abort()

    def is_closing(self) -> bool:
        return self._lower is None or self._lower.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._lower = transport
        self._shake_hands()

    def data_received(self, data: bytes) -> None:
        self._incoming.write(data)
        self._unfinished += data
        while len(self._unfinished) >= _HEADER_BYTES:
            end = _HEADER_BYTES + int.from_bytes(self._unfinished[3:_HEADER_BYTES], "big")
            if len(self._unfinished) < end:
                break
            self._unfinished = self._unfinished[end:]
        if not self._is_secure:
            self._shake_hands()
        if self._is_secure:
            self._decrypt()

    def eof_received(self) -> None:
        if self._is_secure:
            self._upper.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        error = self._error or exc
        if self._is_secure:
            self._upper.connection_lost(error)
        else:
            self._fail(error or ConnectionResetError("the connection was closed during the TLS handshake"))
        self._lower = self._error = None  # which may refer to this layer

    def _shake_hands(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
        except OSError as exc:
            self._flush()  # tells the server why
            self._fail(exc)
        else:
            self._flush()
            self._is_secure = True
            if not self._secured.done():
                self._secured.set_result(None)
            self._upper.connection_made(self)

    def _decrypt(self) -> None:
        try:
            while data := self._tls.read(_CHUNK_BYTES):
                self._upper.data_received(data)
            self._upper.eof_received()
            self.abort()
        except ssl.SSLWantReadError:
            self._flush()  # what the server's messages about TLS itself are answered with
        except OSError as exc:
            self._fail(exc)

    def _flush(self) -> None:
        if self._lower is not None and self._outgoing.pending:
            self._lower.write(self._outgoing.read())

    def _fail(self, error: Exception) -> None:
        self._error = error
        if not self._secured.done():
            self._secured.set_exception(error)
            self._secured.exception()  # marks it as retrieved: asyncio logs errors that nothing awaits
        self.abort()
