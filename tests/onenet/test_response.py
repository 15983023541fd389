"""What is quoted of a response: no part of the credentials, however a server encodes what it repeats."""

from collections.abc import Callable
from urllib.parse import quote

import pytest

from tests.support.memory import peak_of
from tests.support.spellings import SPELLINGS
from worker.onenet.response import Response
from worker.onenet.transport import MAX_RESPONSE_BYTES

KEY = "S3cret/Master+Key="
TOKEN = "version=2022-05-01&res=products%2F1&sign=" + quote(KEY, safe="")
LETTERS = "QZXJVKWY"
LONG_KEY = LETTERS * 4
NOTHING = ", without a printable body"


def excerpt(body: bytes, *secrets: str) -> str:
    """Return what is quoted of a body."""
    description = Response(403, {}, body, secrets).description.removeprefix("HTTP 403, no content type")
    return "" if description == NOTHING else description.removeprefix(": ")


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize(
    ("secret", "repeated"),
    [(KEY, KEY), (TOKEN, KEY), ("p\xe4ssw\xf6rt", "p\xe4ssw\xf6rt"), ("S3", "S3"), ("100%S3&", "100%S3&")],
    ids=["key", "token", "letters outside ASCII", "short", "marks"],
)
def test_a_text_that_repeats_a_secret_is_not_quoted(secret: str, repeated: str, spell: Callable[[str], bytes]) -> None:
    spelled = spell(repeated)
    headers = {b"content-type": spelled, b"content-encoding": b"x" + spelled}
    response = Response(403, headers, b"<p>wrong " + spelled + b"</p>", ("", "another secret", secret))
    assert response.description == "HTTP 403, ***, encoded as ***: ***"


@pytest.mark.parametrize("start", range(10))
def test_eight_letters_and_digits_of_a_secret_are_a_part_that_is_not_quoted(start: int) -> None:
    secret = "0a1b2c3d4e5f6g7h8i"
    assert excerpt(f"it ends with {secret[start : start + 8]}, is it so?".encode(), secret) == "***"
    shown = f"it ends with {secret[start : start + 7]}, is it so?"
    assert excerpt(shown.encode(), secret) == shown


@pytest.mark.parametrize("text", ["wrong password", "svc:pass@proxy", "bypassed", "PASS", "<b>p</b>ass pa. ss"])
def test_of_a_secret_with_fewer_than_eight_a_text_that_has_them_all_is_not_quoted(text: str) -> None:
    assert excerpt(text.encode(), "pass") == "***"
    assert excerpt(b"no pas, no port", "pass") == "no pas, no port"


def test_a_secret_without_letters_and_digits_of_ascii_may_be_in_every_text() -> None:
    """Its bytes in an unknown encoding cannot be told from others."""
    assert excerpt(b"refused", "\xe4\xf6\xfc") == excerpt(b"refused", "!!!") == "***"
    assert excerpt(b"", "!!!") == ""


@pytest.mark.parametrize("filler", ["x", " ", "\0", "\xa0", "\u3000", "\ue000", "\U0001f600", "\U000f0000"], ids=ascii)
def test_no_place_of_a_secret_in_a_body_lets_its_beginning_be_quoted(filler: str) -> None:
    """What is read of a body ends somewhere, and blanks are removed from it."""
    for count in range(900, 4_200):
        shown = excerpt(filler.encode() * count + LONG_KEY.encode() + b"." * 5_000, LONG_KEY)
        assert not set(LETTERS) & set(shown), count


@pytest.mark.parametrize("spell", [str.encode, SPELLINGS["HTML, decimal with zeros"]], ids=["as it is", "HTML"])
@pytest.mark.parametrize("filler", ["x", " ", "\0", "\u3000"], ids=ascii)
@pytest.mark.parametrize("max_chars", [200, 500])
def test_no_place_of_a_secret_in_a_text_lets_its_beginning_be_quoted(
    max_chars: int, filler: str, spell: Callable[[str], bytes]
) -> None:
    response = Response(200, {}, b"", (LONG_KEY,))
    spelled = spell(LONG_KEY).decode()
    for count in range(0, 6_000, 7):
        text = filler * count + spelled + "." * 5_000
        for shown in (response.redacted(text, max_chars), response.one_line(text, max_chars)):
            assert len(shown) <= max_chars
            assert not set(spelled) & set(shown), count


@pytest.mark.parametrize(
    "unit", [b"&", b"&#", b"9", b"&a", b"&amp;", b"%41", b"%25", b"\\u0041", b"\\", b"\xff", "\U0001f600".encode()]
)
@pytest.mark.parametrize("start", [b"", b"&#", b"&#x"])
def test_little_is_read_of_a_large_body(start: bytes, unit: bytes) -> None:
    body = start + unit * (MAX_RESPONSE_BYTES // len(unit))
    assert peak_of(lambda: excerpt(body, KEY)) < 4 * MAX_RESPONSE_BYTES


def test_bytes_that_are_not_text_are_not_quoted() -> None:
    assert Response(502, {}, b"\xff\xfebad\xe4").description == "HTTP 502, no content type: bad"


@pytest.mark.parametrize(
    "text", ["wrong key", "100% of &c., 5&#37; \\u of \\ %", "invalid parameter: imei=865820030000001"]
)
def test_a_text_that_repeats_no_secret_is_quoted_as_it_is(text: str) -> None:
    assert excerpt(text.encode(), KEY, TOKEN, "p\xe4ssw\xf6rt", "S3", "") == text
