"""A proxy that repeats its password in an answer: it is in no error and no reply, however short it is."""

import socket
from base64 import b64encode
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
