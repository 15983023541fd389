"""The transport against a second implementation on requests: they understand the same, or the transport refuses."""

import asyncio
import gzip
import json
import socket
import time
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.onenet.oracle import HEADERS, Answered, post_with_requests
from tests.support.onenet_client import accepting_response, read_request
from tests.support.proxies import raw_server
from worker.errors import TransportError
from worker.onenet.route import Route
from worker.onenet.transport import MAX_RESPONSE_BYTES, HTTPTransport, Request
from worker.telemetry.tracing import NoTracing

TIMEOUT_S = 30.0  # every server of these tests closes its connections
BODY = b'{"args":"on"}'
OK = b"HTTP/1.1 200 OK\r\n"
ACCEPTED = accepting_response()
JSON = ACCEPTED.partition(b"\r\n\r\n")[2]
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
IN_CHUNKS = CHUNKED + b"10\r\n" + JSON[:16] + b"\r\n%x\r\n" % len(JSON[16:]) + JSON[16:] + b"\r\n0\r\n\r\n"
UNTIL_CLOSED = OK + b"Content-Type: application/json\r\n\r\n" + JSON
STATUSES = (201, 299, 400, 401, 404, 413, 500, 502, 599)
LENGTH = b"Content-Length: %d\r\n" % len(JSON)


def serving(*pieces: bytes) -> Callable[[socket.socket], None]:
    """Return a server that sends these pieces after a request, and closes the connection."""

    def serve(sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        read_request(sock)
        for piece in pieces:
            sock.sendall(piece)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass

    return serve


async def understood(*pieces: bytes) -> Answered | None:
    """Return what the transport understands of a response; None: a TransportError."""
    with raw_server(serving(*pieces)) as url:
        transport = HTTPTransport(
            Route(url, None), connect_timeout_s=TIMEOUT_S, read_timeout_s=TIMEOUT_S, tracing=NoTracing()
        )
        try:
            found = await transport.send(Request("/", {}, BODY), time.monotonic() + TIMEOUT_S)
        except TransportError:
            return None
        headers = {name: value for name in HEADERS if (value := found.header(name)) is not None}
        return Answered(found.status, found.body, headers)


async def understood_by_the_oracle(*pieces: bytes) -> Answered | None:
    with raw_server(serving(*pieces)) as url:
        return await asyncio.to_thread(post_with_requests, url + "/", BODY, TIMEOUT_S)


async def assert_same_or_stricter(response: bytes) -> None:
    ours = await understood(response)
    if ours is not None:
        assert ours == await understood_by_the_oracle(response)


def with_body(status: bytes, body: bytes, *headers: bytes) -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"HTTP/1.1 %b\r\n%bContent-Length: %d\r\n\r\n%b" % (status, lines, len(body), body)


BOTH_UNDERSTAND: dict[str, bytes] = {
    "length": ACCEPTED,
    "chunks": IN_CHUNKS,
    "until closed": UNTIL_CLOSED,
    "chunk extension": CHUNKED + b"5;a=b\r\nhello\r\n0\r\n\r\n",
    "chunk size in capitals": CHUNKED + b"A\r\n" + b"x" * 10 + b"\r\n0\r\n\r\n",
    "chunk size with zeros": CHUNKED + b"0005\r\nhello\r\n0\r\n\r\n",
    "trailer": CHUNKED + b"5\r\nhello\r\n0\r\nX-Checksum: 1\r\n\r\n",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\n" + LENGTH + b"\r\n" + JSON,
    "HTTP/1.0 until closed": b"HTTP/1.0 200 OK\r\n\r\n" + JSON,
    "no reason phrase": b"HTTP/1.1 200 \r\n" + LENGTH + b"\r\n" + JSON,
    "no blank after the status": b"HTTP/1.1 200\r\n" + LENGTH + b"\r\n" + JSON,
    "reason phrase in Latin-1": b"HTTP/1.1 200 d\xe9j\xe0 vu\r\n" + LENGTH + b"\r\n" + JSON,
    "names in capitals": OK + LENGTH.upper() + b"\r\n" + JSON,
    "no blank after the colon": OK + LENGTH.replace(b": ", b":") + b"\r\n" + JSON,
    "length with zeros": OK + LENGTH.replace(b": ", b": 000") + b"\r\n" + JSON,
    "empty header": OK + b"X:\r\n" + LENGTH + b"\r\n" + JSON,
    "header in UTF-8": OK + "X: 开\r\n".encode() + LENGTH + b"\r\n" + JSON,
    "bytes after the body": ACCEPTED + b"and more",
    "a second response": ACCEPTED + ACCEPTED.replace(b'"u"', b'"v"'),
    "blank line after the body": ACCEPTED + b"\r\n",
    "connection: close": with_body(b"200 OK", JSON, b"Connection: close"),
    "connection: keep-alive": with_body(b"200 OK", JSON, b"Connection: keep-alive", b"Keep-Alive: timeout=5"),
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "304": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
    "no body": with_body(b"200 OK", b""),
    "redirect": with_body(b"307 Temporary Redirect", b"", b"Location: http://127.0.0.1:9/"),
    "retry-after": with_body(b"429 Too Many Requests", b"", b"Retry-After: 7"),
    "retry-after with blanks": with_body(b"503 Service Unavailable", b"", b"Retry-After: \t 7 \t"),
    "date": with_body(b"200 OK", JSON, b"Date: Sat, 28 Nov 2026 21:27:46 GMT"),
    "zipped in spite of identity": with_body(b"200 OK", gzip.compress(JSON), b"Content-Encoding: gzip"),
    "cookie": with_body(b"200 OK", JSON, b"Set-Cookie: a=b", b"Set-Cookie: c=d"),
    "long body": with_body(b"200 OK", b"x" * (MAX_RESPONSE_BYTES - 1000)),
    "long header": with_body(b"200 OK", JSON, b"X: " + b"x" * 60_000),
    **{f"status {status}": with_body(b"%d X" % status, JSON) for status in STATUSES},
}  # fmt: skip


@pytest.mark.parametrize("response", BOTH_UNDERSTAND.values(), ids=BOTH_UNDERSTAND)
async def test_transport_and_oracle_understand_a_valid_response_alike(response: bytes) -> None:
    ours = await understood(response)
    assert ours is not None
    assert ours == await understood_by_the_oracle(response)


DOUBTFUL: dict[str, bytes] = {
    "nothing": b"",
    "not HTTP": b"220 mail.example.org ESMTP\r\n",
    "a request": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS alert": b"\x15\x03\x01\x00\x02\x02\x46",
    "HTTP/2 settings": b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    "HTTP/0.9": JSON,
    "blank line first": b"\r\n" + ACCEPTED,
    "blank first": b" " + ACCEPTED,
    "name in small letters": ACCEPTED.replace(b"HTTP", b"http"),
    "HTTP/1.2": ACCEPTED.replace(b"1.1", b"1.2"),
    "HTTP/2": ACCEPTED.replace(b"HTTP/1.1", b"HTTP/2"),
    "HTTP/9.9.9": ACCEPTED.replace(b"1.1", b"9.9.9"),
    "status 2000": ACCEPTED.replace(b"200", b"2000"),
    "status 20": ACCEPTED.replace(b"200", b"20"),
    "status +200": ACCEPTED.replace(b"200", b"+200"),
    "status a word": ACCEPTED.replace(b"200 ", b""),
    "status 0x": ACCEPTED.replace(b"200", b"0x1"),
    "two blanks before the status": ACCEPTED.replace(b" 200", b"  200"),
    "bare LF everywhere": ACCEPTED.replace(b"\r\n", b"\n"),
    "bare LF after the status": ACCEPTED.replace(b"\r\n", b"\n", 1),
    "bare LF after a header": OK + LENGTH.replace(b"\r\n", b"\n") + b"\r\n" + JSON,
    "bare CR everywhere": ACCEPTED.replace(b"\r\n", b"\r"),
    "bare CR in a header": OK + b"X: a\rContent-Length: 1\r\n" + LENGTH + b"\r\n" + JSON,
    "bare LF in chunks": CHUNKED + IN_CHUNKS[len(CHUNKED) :].replace(b"\r\n", b"\n"),
    "header without a colon": OK + b"Content-Length 5\r\n\r\nhello",
    "blank before the colon": OK + LENGTH.replace(b":", b" :") + b"\r\n" + JSON,
    "header without a name": OK + b": x\r\n" + LENGTH + b"\r\n" + JSON,
    "header with NUL": OK + b"X: a\0b\r\n" + LENGTH + b"\r\n" + JSON,
    "folded header": OK + b"X: a\r\n b\r\n" + LENGTH + b"\r\n" + JSON,
    "folded length": OK + b"Content-Length:\r\n 5\r\n\r\nhello",
    "first header folded": OK + b" X: a\r\n" + LENGTH + b"\r\n" + JSON,
    "same length twice": OK + LENGTH + LENGTH + b"\r\n" + JSON,
    "two lengths": OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "list of lengths": OK + b"Content-Length: 5, 5\r\n\r\nhello",
    "list of different lengths": OK + b"Content-Length: 5, 6\r\n\r\nhello!",
    "length a word": OK + b"Content-Length: five\r\n\r\nhello",
    "length negative": OK + b"Content-Length: -5\r\n\r\nhello",
    "length with a sign": OK + b"Content-Length: +5\r\n\r\nhello",
    "length hexadecimal": OK + b"Content-Length: 0x5\r\n\r\nhello",
    "length with an underscore": OK + b"Content-Length: 1_0\r\n\r\nhellohello",
    "length in other digits": OK + "Content-Length: \u0665\r\n\r\nhello".encode(),
    "length empty": OK + b"Content-Length:\r\n\r\nhello",
    "length enormous": OK + b"Content-Length: 99999999999999999999999\r\n\r\nhello",
    "length and chunks": OK + LENGTH + IN_CHUNKS[len(OK) :],
    "length 0 and chunks": OK + b"Content-Length: 0\r\n" + IN_CHUNKS[len(OK) :],
    "chunks and length": CHUNKED[:-2] + LENGTH + IN_CHUNKS[len(CHUNKED) - 2 :],
    "chunked twice": OK + b"Transfer-Encoding: chunked, chunked\r\n" + IN_CHUNKS[len(CHUNKED) - 2 :],
    "chunked in two headers": OK + b"Transfer-Encoding: chunked\r\n" + IN_CHUNKS[len(OK) :],
    "gzip, chunked": OK + b"Transfer-Encoding: gzip, chunked\r\n" + IN_CHUNKS[len(CHUNKED) - 2 :],
    "chunked, gzip": OK + b"Transfer-Encoding: chunked, gzip\r\n" + IN_CHUNKS[len(CHUNKED) - 2 :],
    "identity": OK + b"Transfer-Encoding: identity\r\n" + LENGTH + b"\r\n" + JSON,
    "unknown encoding": OK + b"Transfer-Encoding: x\r\n\r\n" + JSON,
    "chunked in HTTP/1.0": IN_CHUNKS.replace(b"1.1", b"1.0", 1),
    "chunk size a word": CHUNKED + b"xyz\r\nhello\r\n0\r\n\r\n",
    "chunk size negative": CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n",
    "chunk size with a sign": CHUNKED + b"+5\r\nhello\r\n0\r\n\r\n",
    "chunk size with 0x": CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n",
    "chunk size with an underscore": CHUNKED + b"0_5\r\nhello\r\n0\r\n\r\n",
    "chunk size with a blank": CHUNKED + b"5 \r\nhello\r\n0\r\n\r\n",
    "chunk size after a blank": CHUNKED + b" 5\r\nhello\r\n0\r\n\r\n",
    "chunk size empty": CHUNKED + b"\r\nhello\r\n0\r\n\r\n",
    "chunk size enormous": CHUNKED + b"f" * 40 + b"\r\nhello",
    "chunk too long": CHUNKED + b"5\r\nhelloo\r\n0\r\n\r\n",
    "last chunk missing": CHUNKED + b"5\r\nhello\r\n",
    "end of the last chunk missing": CHUNKED + b"5\r\nhello\r\n0\r\n",
    "trailer with a length": CHUNKED + b"5\r\nhello\r\n0\r\nContent-Length: 3\r\n\r\n",
    "204 with a length": b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello",
    "204 in chunks": b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "304 with a body": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\nhello",
    "switching protocols": b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + ACCEPTED,
    "upgrade": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
    "200 with an upgrade": with_body(b"200 OK", JSON, b"Upgrade: h2c", b"Connection: upgrade"),
    "too long": with_body(b"200 OK", b"x" * (MAX_RESPONSE_BYTES + 1)),
    "too long until closed": OK + b"\r\n" + b"x" * (MAX_RESPONSE_BYTES + 1),
    "header too long": OK + b"X: " + b"x" * MAX_RESPONSE_BYTES,
    "two retry-afters": with_body(b"429 X", b"", b"Retry-After: 1")[:-4] + b"\r\n\r\n",
    "zipped and cut": with_body(b"200 OK", gzip.compress(JSON)[:-9], b"Content-Encoding: gzip"),
}  # fmt: skip


@pytest.mark.parametrize("response", DOUBTFUL.values(), ids=DOUBTFUL)
async def test_the_transport_understands_a_doubtful_response_as_the_oracle_does_or_refuses_it(response: bytes) -> None:
    await assert_same_or_stricter(response)


INTERIM: dict[str, bytes] = {
    "100": b"HTTP/1.1 100 Continue\r\n\r\n",
    "102 and 103": b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\nDate: today\r\n\r\n",
}


@pytest.mark.parametrize("interim", INTERIM.values(), ids=INTERIM)
@pytest.mark.parametrize("final", [ACCEPTED, IN_CHUNKS, UNTIL_CLOSED], ids=["length", "chunks", "until closed"])
async def test_interim_responses_change_nothing(interim: bytes, final: bytes) -> None:
    """http.client takes each of them but 100 for the final response, so the oracle only gets that."""
    assert await understood(interim + final) == await understood_by_the_oracle(final)


KINDS = pytest.mark.parametrize(
    "response", [ACCEPTED, IN_CHUNKS, UNTIL_CLOSED], ids=["length", "chunks", "until closed"]
)


@KINDS
async def test_a_response_cut_at_any_byte_is_refused_or_understood_as_by_the_oracle(response: bytes) -> None:
    for end in range(len(response)):
        await assert_same_or_stricter(response[:end])


@pytest.mark.parametrize("response", [ACCEPTED, IN_CHUNKS], ids=["length", "chunks"])
async def test_a_response_with_a_length_is_refused_wherever_it_is_cut(response: bytes) -> None:
    for end in range(len(response)):
        assert await understood(response[:end]) is None


@KINDS
async def test_a_response_is_understood_wherever_the_network_divides_it(response: bytes) -> None:
    whole = await understood(response)
    for at in range(1, len(response)):
        assert await understood(response[:at], response[at:]) == whole
    assert await understood(*_bytes_of(response)) == whole


def _bytes_of(response: bytes) -> Sequence[bytes]:
    return [response[at : at + 1] for at in range(len(response))]


@given(
    response=st.sampled_from([ACCEPTED, IN_CHUNKS, UNTIL_CLOSED]),
    position=st.floats(0, 1, exclude_max=True),
    removed=st.integers(0, 3),
    inserted=st.binary(max_size=3) | st.sampled_from([b"\r\n", b"\n", b"\r", b"0", b"-", b":", b" ", b"\t", b"\0"]),
)
@settings(max_examples=150, deadline=None)
async def test_a_damaged_response_is_refused_or_understood_as_by_the_oracle(
    response: bytes, position: float, removed: int, inserted: bytes
) -> None:
    at = int(position * len(response))
    await assert_same_or_stricter(response[:at] + inserted + response[at + removed :])


def test_the_responses_of_the_corpus_have_the_lengths_that_they_say() -> None:
    assert json.loads(JSON)["errno"] == 0
    assert len(JSON) == int(LENGTH.split()[1])
