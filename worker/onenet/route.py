"""How the platform is reached: directly, or through the proxy that the environment names.

Decided once, for the requests that must not be repeated and for the reads of the history.
"""

import ssl
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import requests
from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3.util import Url, parse_url

from worker.errors import SettingsError
from worker.onenet.proxies import environment_proxy
from worker.settings_files import UnusableFile, check_certificates

MAX_LOOK_UPS = 64  # of one platform at once; each new connection needs one
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Server:
    """The platform or a proxy. ``host``: a name or an address, without brackets."""

    host: str
    port: int
    is_tls: bool

    @classmethod
    def of(cls, url: Url) -> Self:
        assert url.host is not None  # checked by the settings and by environment_proxy
        assert url.scheme is not None
        return cls(url.host.strip("[]"), url.port or _PORTS[url.scheme], url.scheme == "https")

    @property
    def authority(self) -> str:
        """Host and port as in a CONNECT request."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def tls_name(self) -> str:
        """The name that the certificate must have: without a trailing dot, and without the zone of an address."""
        return self.host.partition("%")[0].rstrip(".")


class Route:
    """The route to one platform. The environment is read once, when the route is made.

    Args:
        base_url: the platform's URL, without a trailing slash.
        ca_file: the certificate authorities to trust instead of the default ones.

    Attributes:
        platform: the platform.
        proxy: the proxy, if there is one.
        proxy_url: its URL, with user and password.
        first: the server to connect to: the proxy, or the platform.
        proxy_headers: the headers that the proxy wants.
        secrets: the proxy's password, and what it is sent as.
        is_forwarded: the proxy forwards requests; otherwise it opens a tunnel.
        tls: how certificates are verified; None if no connection uses TLS.
        look_ups: the threads that look up host names. If the platform's name server hangs, it must not occupy the
            event loop's own threads, which serve the broker and Redis.

    Raises:
        SettingsError: the environment names an unusable proxy, or certificate authorities that cannot be read.
    """

    def __init__(self, base_url: str, ca_file: str | None) -> None:
        with requests.Session() as session:
            environment = session.merge_environment_settings(base_url, {}, None, ca_file, None)
        self.base_url = base_url
        self.look_ups = ThreadPoolExecutor(MAX_LOOK_UPS, thread_name_prefix="look-up")
        self.proxy_url = environment_proxy(base_url)
        self._url = parse_url(base_url)
        self.platform = Server.of(self._url)
        self.proxy = None if self.proxy_url is None else Server.of(parse_url(self.proxy_url))
        self.first = self.proxy or self.platform
        self.proxy_headers = {} if self.proxy_url is None else _proxy_headers(self.proxy_url)
        self.secrets = tuple(secret for value in self.proxy_headers.values() for secret in _secrets_of(value))
        self.is_forwarded = self.proxy is not None and not self.platform.is_tls
        needs_tls = self.platform.is_tls or (self.proxy is not None and self.proxy.is_tls)
        self.tls = _tls_context(environment["verify"] or True) if needs_tls else None

    @property
    def target_prefix(self) -> str:
        """The part of a request's target before its path: the whole base URL if a proxy forwards the request."""
        path = (self._url.path or "").rstrip("/")
        return f"{self._url.scheme}://{self._url.netloc}{path}" if self.is_forwarded else path

    @property
    def headers(self) -> dict[str, str]:
        """The headers that every request over this route needs."""
        return {"Host": self._url.netloc or "", **(self.proxy_headers if self.is_forwarded else {})}


def _proxy_headers(url: str) -> dict[str, str]:
    try:
        return HTTPAdapter().proxy_headers(parse_url(url).url)
    except UnicodeEncodeError:
        line = "user name and password of the environment's proxy must be Latin-1, since they travel in a header"
        raise SettingsError([line]) from None


def _secrets_of(authorization: str) -> tuple[str, str]:
    """Return what a Proxy-Authorization header has of the password: encoded with the user name, and plain."""
    encoded = authorization.rpartition(" ")[2]
    return encoded, b64decode(encoded).decode("latin-1").partition(":")[2]


def _tls_context(authorities: str | bool) -> ssl.SSLContext:
    path = DEFAULT_CA_BUNDLE_PATH if isinstance(authorities, bool) else authorities
    is_folder = Path(path).is_dir()
    names = "REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE"
    try:
        if not is_folder:
            check_certificates(Path(path))  # OpenSSL would wait for a FIFO's writer
        context = ssl.create_default_context(cafile=None if is_folder else path, capath=path if is_folder else None)
    except UnusableFile as exc:
        raise SettingsError([f"{names}: {exc}"]) from exc
    except (OSError, ssl.SSLError) as exc:
        raise SettingsError([f"{names}: holds no certificates that can be read ({path})"]) from exc
    context.set_alpn_protocols(["http/1.1"])
    return context
