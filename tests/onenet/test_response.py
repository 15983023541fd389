"""What is quoted of a response: never the credentials, however a server encodes what it repeats."""

import html
import json
from urllib.parse import quote

import pytest

from worker.onenet.response import Response

KEY = "S3cret/Master+Key="


@pytest.mark.parametrize(
    "spelled",
    [
        KEY,
        quote(KEY, safe=""),
        "S3cret%2fMaster%2bKey%3d",
        KEY.replace("/", r"\/"),
        json.dumps(KEY).replace("+", r"\u002B").replace("=", r"\u003d"),
        html.escape(KEY).replace("/", "&#x2F;").replace("+", "&#43;").replace("=", "&#x003d;"),
        KEY.replace("/", "&#47;"),
    ],
)
@pytest.mark.parametrize("secret", [KEY, "version=2022-05-01&res=products%2F1&sign=" + quote(KEY, safe="")])
def test_a_secret_is_not_quoted_in_any_spelling(spelled: str, secret: str) -> None:
    response = Response(200, {b"content-type": b"text/html"}, f"<p>{spelled}</p>".encode(), (secret,))
    assert "***" in response.description
    for part in ("S3cret", "Master", "Key"):
        assert part not in response.description
        assert part not in response.redacted(f"wrong key {spelled}")


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("wrong password 'pass' for svc", "wrong *** *** for svc"),
        ("<p>svc%3Apass</p> refused", "*** refused"),
        ("user svc:p\\u0061ss", "user ***"),
        ("bypassed and surpassed", "*** and ***"),
        ("a pas s", "a pas s"),
    ],
)
def test_of_a_short_secret_the_whole_word_is_not_quoted(text: str, quoted: str) -> None:
    """The rest of the word would tell it."""
    assert Response(407, {}, b"", ("pass", "")).redacted(text) == quoted


@pytest.mark.parametrize("body", ["p\xe4ssw\xf6rt".encode(), "p\xe4ssw\xf6rt".encode("latin-1"), b"p%c3%a4ssw%F6rt"])
def test_a_secret_is_not_quoted_in_another_encoding(body: bytes) -> None:
    response = Response(407, {b"content-type": body}, b"<p>" + body, ("p\xe4ssw\xf6rt",))
    assert response.description == "HTTP 407, ***: <p>***"


def test_bytes_that_are_not_text_are_not_quoted() -> None:
    assert Response(502, {}, b"\xff\xfebad\xe4").description == "HTTP 502, no content type: bad"


def test_what_resembles_a_secret_stays() -> None:
    response = Response(200, {}, b"S3cret/Master", (KEY,))
    assert response.description.endswith("S3cret/Master")
