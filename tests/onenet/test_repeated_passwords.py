"""A server that repeats a password or a key in an answer: it is in no error and no reply, however short it is."""

import json
import socket
from base64 import b64encode
from collections.abc import Callable
from urllib.parse import quote

import pytest

from tests.support.builders import AN_IMEI
from tests.support.onenet_client import (
    NEVER,
    command,
    current_doubt,
    none_owned,
    onenet_client,
    read_request,
    use_proxy,
)
from tests.support.proxies import raw_server
from tests.support.simulator import API_KEY
from tests.support.spellings import SPELLINGS
from worker.core.answer import Answer, Refused
from worker.errors import HistoryUnreadable, PlatformUnusable

PASSWORDS = ["S3cretPassword", "S3\xe4cret", "S3"]


def forms(password: str) -> list[bytes]:
    """Return what a proxy may repeat of its password, in several encodings."""
    sent = b64encode(f"svc:{password}".encode("latin-1"))
    latin_1 = quote(password, safe="", encoding="latin-1").encode()
    return [password.encode(), password.encode("latin-1"), quote(password).encode(), latin_1, sent, sent.rstrip(b"=")]


ANSWERS = [
    b"HTTP/1.1 407 %b\r\n\r\n",
    b"HTTP/1.1 407 X\r\nContent-Type: text/%b\r\n\r\n<p>wrong password '%b'</p>",
    b"HTTP/1.1 403 X\r\n\r\nuser=svc&password=%b",
    b'HTTP/1.1 401 X\r\n\r\n{"errno":1,"error":"auth failed: %b","data":null}',
    b'HTTP/1.1 200 OK\r\n\r\n{"errno":3,"error":"invalid parameter %b","data":null}',
    b"HTTP/1.1 %b X\r\n\r\n",
    b"%b 407 X\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: %b\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n%b",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%b\r\n",
    b"HTTP/1.1 302 %b\r\nLocation: http://svc:%b@127.0.0.1:1/\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n%b\r\n\r\n",
]


@pytest.mark.parametrize("password", PASSWORDS, ids=ascii)
@pytest.mark.parametrize("answer", ANSWERS, ids=ascii)
@pytest.mark.parametrize("scheme", ["http", "https"], ids=["forwarded", "tunnel"])
async def test_a_password_that_the_proxy_repeats_is_in_no_error(
    scheme: str, answer: bytes, password: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated = answer.replace(b"%b", b" ".join(forms(password)))

    def refuse(sock: socket.socket) -> None:
        read_request(sock)
        sock.sendall(repeated)

    with raw_server(refuse) as proxy:
        use_proxy(monkeypatch, scheme, proxy.replace("://", f"://svc:{quote(password)}@"))
        with onenet_client(f"{scheme}://onenet.invalid") as client:
            with pytest.raises(HistoryUnreadable) as unreadable:
                await client.find_candidates(command(), current_doubt(), none_owned)
            with pytest.raises(PlatformUnusable) as unusable:
                await client.check(None, AN_IMEI)
            found = await client.execute(command(), NEVER)
    for text in (str(unreadable.value), str(unusable.value), repr(found.answer)):
        for form in forms(password):
            assert form.decode("utf-8", "ignore") not in text


async def repeated_by(answer: bytes) -> tuple[Answer, str, str]:
    """Return what a command, a look at a history and a check say of one answer of the platform."""

    def serve(sock: socket.socket) -> None:
        read_request(sock)
        sock.sendall(
            b"HTTP/1.1 403 X\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%b" % (len(answer), answer)
        )

    with raw_server(serve) as url, onenet_client(url) as client:
        with pytest.raises(HistoryUnreadable) as unreadable:
            await client.count_waiting(command(), 1)
        with pytest.raises(PlatformUnusable) as unusable:
            await client.check(None, AN_IMEI)
        found = await client.execute(command(), NEVER)
    return found.answer, str(unreadable.value), str(unusable.value)


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
async def test_a_key_that_the_platform_repeats_is_in_no_error(spell: Callable[[str], bytes]) -> None:
    spelled = spell(API_KEY)
    page = "HTTP 403, text/html: ***"
    assert await repeated_by(b"<p>you sent " + spelled) == (
        Refused("http_rejected", page, may_concern_all_devices=True),
        page,
        f"refuses the credentials: {page}",
    )
    text = f"auth failed: {spelled.decode('utf-8', 'replace')}"
    answer, unreadable, unusable = await repeated_by(json.dumps({"errno": 1, "error": text}).encode())
    assert answer == Refused("onenet_rejected", "***", 1, may_concern_all_devices=True)
    assert unreadable == "errno 1: ***"
    assert ": errno 1: ***; " in unusable


@pytest.mark.parametrize("before", ["x", " ", "\0"], ids=ascii)
@pytest.mark.parametrize("count", [49, 169, 189, 489, 2_989, 3_989, 4_065])
async def test_no_part_of_a_key_is_quoted_where_an_answer_is_cut(count: int, before: str) -> None:
    text = before * count + API_KEY
    for body in (text, json.dumps({"errno": 1, "error": f"no{text}"})):
        for said in await repeated_by(body.encode()):
            assert not any(API_KEY[:length] in str(said) for length in range(4, len(API_KEY) + 1))
