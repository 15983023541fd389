"""The URL of Redis: what is read from it, and which line says what is wrong with it."""

import pytest

from worker.core.redis_address import RedisAddress


@pytest.mark.parametrize(
    ("url", "nodes", "master", "options"),
    [
        ("redis://host", [("host", 6379)], None, {"db": 0}),
        ("REDIS://:p%40@[::1]:1/2", [("::1", 1)], None, {"db": 2, "password": "p@"}),
        ("redis://host?socket_timeout=0.5&db=3", [("host", 6379)], None, {"db": 3, "socket_timeout": 0.5}),
        (
            "redis+sentinel://user:pass@a:1,b,[::1]:3/my-master/4",
            [("a", 1), ("b", 26379), ("::1", 3)],
            "my-master",
            {"db": 4, "username": "user", "password": "pass"},
        ),
        ("redis+sentinel://a/m", [("a", 26379)], "m", {"db": 0}),
        ("redis://host?password=a+b%2Bc", [("host", 6379)], None, {"db": 0, "password": "a+b+c"}),
        (
            "rediss://host?ssl_certfile=/c.pem",
            [("host", 6379)],
            None,
            {"db": 0, "ssl_certfile": "/c.pem", "ssl_password": ""},
        ),
        ("rediss://host?ssl_cert_reqs=NONE", [("host", 6379)], None, {"db": 0, "ssl_cert_reqs": "none"}),
    ],
)
def test_a_url_says_where_redis_is(
    url: str, nodes: list[tuple[str, int]], master: str | None, options: dict[str, object]
) -> None:
    found = RedisAddress.parse(url)
    assert (list(found.nodes), found.master, found.options) == (nodes, master, options)
    assert found.is_encrypted == url.startswith("rediss")


def test_the_sentinels_have_a_user_and_a_password_of_their_own_and_the_same_tls() -> None:
    url = "rediss+sentinel://user:pass@a,b/m?sentinel_username=watcher&sentinel_password=w&ssl_check_hostname=no"
    found = RedisAddress.parse(url)
    assert found.sentinel_options == {"username": "watcher", "password": "w", "ssl_check_hostname": False}
    assert found.options == {"db": 0, "username": "user", "password": "pass", "ssl_check_hostname": False}
    assert str(found) == "Redis, by the Sentinels at a:26379, b:26379"


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("redis://h?family=0", "an option after ? is not known; there are client_name, db, "),
        ("redis://h?timeout=5s", "an option after ? is not known; there are client_name, db, "),
        (
            "redis://h?socket_timeout=5s",
            "an option after ? cannot be used: socket_timeout: must be a number of seconds, above 0 and up to 60",
        ),
        ("redis://h?socket_timeout=0", "an option after ? cannot be used: socket_timeout: must be a number of seconds"),
        (
            "redis://h?socket_timeout=nan",
            "an option after ? cannot be used: socket_timeout: must be a number of seconds",
        ),
        (
            "redis://h?socket_keepalive=maybe",
            "an option after ? cannot be used: socket_keepalive: must be true or false",
        ),
        ("redis://h?protocol=9", "an option after ? cannot be used: protocol: must be 2 or 3"),
        ("redis://h?db=-1", "an option after ? cannot be used: db: must be a whole number"),
        ("redis://h?db=1&db=2", "an option after ? cannot be used: db: is set twice"),
        ("redis://h?ssl_ca_certs=/ca.pem", "an option after ? cannot be used: ssl_ca_certs: needs TLS, rediss://"),
        ("rediss://h?ssl_keyfile=/dev/null", "an option after ? cannot be used: ssl_keyfile: needs ssl_certfile"),
        (
            "redis://h?client_name=a%20b",
            "an option after ? cannot be used: client_name: must be of printable characters of ASCII, without a blank",
        ),
        ("redis://h?sentinel_password=x", "an option after ? is not known; there are client_name, db, "),
        ("redis+sentinel://a,b", "must be memory://, redis://user:password@host:port/number"),
        ("redis+sentinel://a,,b/m", "must be "),
        ("redis+sentinel://a/m/db", "must be "),
        ("redis://a,b/0", "must be "),
        ("redis+cluster://a/0", "must be "),
        ("redis://user:12/secret@host", "has an unescaped / (write %2F) in its user name or password"),
        ("unix:///tmp/redis", "must be "),
        ("redis", "must be "),
    ],
)
def test_an_unusable_url_is_refused_in_one_line(url: str, line: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        RedisAddress.parse(url)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
