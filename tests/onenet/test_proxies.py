"""The proxies of the environment: one meaning for all libraries, or refused in one line that does not quote them."""

import pytest
from urllib3.util import parse_url

from worker.errors import SettingsError
from worker.onenet.proxies import environment_proxy
from worker.onenet.route import Route


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the machine's proxies from the environment."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("proxy", "leads_to", "credentials"),
    [
        ("proxy:3128", ("http", "proxy", 3128), None),
        ("http://proxy/", ("http", "proxy", None), None),
        ("HTTPS://proxy:3129", ("https", "proxy", 3129), None),
        ("a:b@[::1]:3128", ("http", "[::1]", 3128), "YTpi"),
        ("http://a:b%2F%40@proxy:1", ("http", "proxy", 1), "YTpiL0A="),
        ("http://a@example.com:b@proxy:1", ("http", "proxy", 1), "YUBleGFtcGxlLmNvbTpi"),
        ('http://a:b^{|}"<>%`@proxy:1', ("http", "proxy", 1), "YTpiXnt8fSI8PiVg"),
        ("http://a:b:c@proxy:1", ("http", "proxy", 1), "YTpiOmM="),
    ],
)
@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_a_proxy_url_means_the_same_to_the_libraries_as_to_the_worker(
    variable: str,
    proxy: str,
    leads_to: tuple[str, str, int | None],
    credentials: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, proxy)
    found = parse_url(environment_proxy("http://onenet.invalid") or "")
    assert (found.scheme, found.host, found.port) == leads_to
    sent = {} if credentials is None else {"Proxy-Authorization": f"Basic {credentials}"}
    assert Route("http://onenet.invalid", None).headers == {"Host": "onenet.invalid", **sent}


UNUSABLE_PROXIES = [
    "http://svc:S3/cret@proxy:3128", "http://svc:12/S3cret@proxy:3128", "svc:S3/cret@proxy", "svc:12/S3cret@proxy",
    "svc:S3cret", "http://svc:S3cret@proxy:port", "http://svc:S3cret@proxy:0", "http://svc:S3cret@proxy:70000",
    "http://svc:S3cret@proxy:3128/path", "http://svc:S3?cret@proxy", "http://svc:S3#cret@proxy",
    "http://svc:12#S3cret@proxy", "http://svc\\svc:S3cret@proxy", "http://svc:S3 cret@proxy",
    "http://svc:S3\ncret@proxy", "http://svc:S3cret@", "http://svc:S3cret@[proxy]", "http://svc:S3cret@pro xy",
    "http://svc:S3cret@[::1", "http://svc:S3cret%FF@proxy", "socks5://svc:S3cret@proxy:1080",
    "SOCKS5H://svc:S3cret@proxy", "ftp://svc:S3cret@proxy", "svc://S3cret@proxy", "http:///svc:S3cret@proxy",
    "://svc:S3cret@proxy", "http://svc:S3cret@", "@", "http://svc:S3cret\u5bc6@proxy",
    "http://svc:S3cret%E5%AF%86@proxy", "http://svc:S3[cret@proxy", "http://svc:S3]cret@proxy:1", "http://[",
    "http://svc:[S3cret]@proxy", "http://svc:S@3[cret@proxy:x", "http://svc:S3cret@[::1]]", "[svc:S3cret@proxy",
]  # fmt: skip


@pytest.mark.parametrize("proxy", UNUSABLE_PROXIES, ids=ascii)
@pytest.mark.parametrize(
    ("url", "variable"), [("http://onenet.invalid", "http_proxy"), ("https://a.invalid", "ALL_PROXY")]
)
def test_an_unusable_proxy_url_is_refused_in_one_line_that_does_not_quote_it(
    url: str, variable: str, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, proxy)
    with pytest.raises(SettingsError) as caught:
        Route(url, None)
    [line] = caught.value.lines
    assert "proxy" in line
    assert "\n" not in line
    assert not [part for part in ("S3", "cret", "svc", "\u5bc6") if part in line]
