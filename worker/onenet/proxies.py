"""The proxies of the environment: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, and NO_PROXY for hosts that need none."""

import re

from requests.utils import get_environ_proxies, select_proxy

from worker.core.urls import HOW_TO_WRITE, SHARED_USER, SLASH, UrlForm
from worker.errors import SettingsError

_PROXY = UrlForm(
    "http",
    "https",
    user=SHARED_USER,
    path=SLASH,
    wanted=f"http://user:password@host:port or https://…; within user and password {HOW_TO_WRITE}",
)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_SOCKS = re.compile(r"(socks4a?|socks5h?)://", re.IGNORECASE)


def environment_proxy(url: str) -> str | None:
    """Return the URL of the proxy that the environment names for a URL; None: no proxy.

    An unusable proxy URL is refused here, before a library sees it: libraries quote it in their errors, with the
    proxy's password.

    Raises:
        SettingsError: the value is not the whole URL of an HTTP proxy.
    """
    found = select_proxy(url, get_environ_proxies(url))
    if found is None:
        return None
    try:
        return _PROXY.check(found if _SCHEME.match(found) else f"http://{found}")
    except ValueError as exc:
        names = f"{url.partition(':')[0].upper()}_PROXY or ALL_PROXY"
        socks = _SOCKS.match(found)
        fault = str(exc) if socks is None else f"must be http://… or https://…, not {socks[1].lower()}://"
        raise SettingsError([f"{names}: the environment's proxy {fault}"]) from None
