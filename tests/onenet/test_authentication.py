"""Signed tokens, compared with a signature made by openssl."""

from urllib.parse import parse_qsl

from pydantic import SecretStr

from tests.support.simulator import ACCESS_KEY, PRODUCT_ID
from worker.core.credentials import AccessKey, UserKey
from worker.onenet.authentication import SignedToken, sign
from worker.onenet.v1 import V1
from worker.onenet.v2 import V2

CREDENTIALS = AccessKey(product_id=PRODUCT_ID, access_key=SecretStr(ACCESS_KEY))


def test_a_token_is_signed_as_the_platform_documents() -> None:
    """printf '1893456000\\nsha256\\nproducts/123123\\n2018-10-31' | openssl dgst -sha256 -hmac KEY -binary | base64."""
    token = sign(CREDENTIALS, 1893456000, V1.signing_version)
    assert token.startswith("version=2018-10-31&res=products%2F123123&et=1893456000&method=sha256&sign=")
    assert dict(parse_qsl(token))["sign"] == "Vvh85MT60LjMpAXf6KjFlDN5f6CCDYVajjk5q85jn5E="
    assert not set(token.partition("sign=")[2]) & set("+/=")  # they would mean something else in the header


def test_a_token_is_reused_until_shortly_before_it_expires() -> None:
    now = [1_000_000.0]
    token = SignedToken(CREDENTIALS, V1.signing_version, lambda: now[0])
    first = token.header()
    now[0] += 2999
    assert token.header() == first
    now[0] += 2
    renewed = token.header()
    assert int(dict(parse_qsl(renewed[1]))["et"]) == 1_000_000 + 3001 + 3600


def test_a_token_is_renewed_after_the_clock_was_set_back() -> None:
    now = [1_000_000.0]
    token = SignedToken(CREDENTIALS, V1.signing_version, lambda: now[0])
    token.header()
    now[0] -= 5000
    assert int(dict(parse_qsl(token.header()[1]))["et"]) == 1_000_000 - 5000 + 3600


def test_the_public_test_vector_of_version_2022_05_01_has_its_signature() -> None:
    """The signature of the platform's documentation, made with the key of a user."""
    key = UserKey(user_id="511932", access_key=SecretStr("720e323b10d54d3a8cdbe5dd4e641052"))
    token = sign(key, 1770000000, V2.signing_version, "sha1")
    assert token == (
        "version=2022-05-01&res=userid%2F511932&et=1770000000&method=sha1&sign=xRvkt1q2HU7quic8C8xb28%2BdrQ4%3D"
    )
