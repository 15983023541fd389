"""How the platform is reached: directly, or through the proxy that the environment names.

requests interprets the environment; urllib3 makes the connections: name resolution, TCP, TLS, and a proxy's tunnel.
"""

import ssl
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3.connection import HTTPConnection, HTTPSConnection, ProxyConfig
from urllib3.util import Url, parse_url

from worker.errors import SettingsError
from worker.onenet.proxies import environment_proxy


class Route:
    """The route to one platform. The environment is read once, when the route is made.

    Args:
        base_url: the platform's URL, without a trailing slash.
        connect_timeout_s: longest wait for each step of making a connection.
        ca_file: the certificate authorities to trust instead of the default ones.

    Raises:
        SettingsError: the environment names an unusable proxy, or certificate authorities that cannot be read.
    """

    def __init__(self, base_url: str, connect_timeout_s: float, ca_file: str | None) -> None:
        with requests.Session() as session:
            environment = session.merge_environment_settings(base_url, {}, None, ca_file, None)
        proxy = environment_proxy(base_url)
        self.base_url = base_url
        self._connect_timeout_s = connect_timeout_s
        self._platform = parse_url(base_url)
        self._proxy = None if proxy is None else parse_url(proxy)
        self._proxy_headers = {} if self._proxy is None else _proxy_headers(self._proxy)
        needs_tls = "https" in {self._platform.scheme, self._proxy and self._proxy.scheme}
        self._tls = _tls_context(environment["verify"] or True) if needs_tls else None

    @property
    def target_prefix(self) -> str:
        """The part of a request's target before its path: the whole base URL if a proxy forwards the request."""
        path = (self._platform.path or "").rstrip("/")
        return f"{self._platform.scheme}://{self._platform.netloc}{path}" if self._is_forwarded else path

    @property
    def headers(self) -> dict[str, str]:
        """The headers that every request over this route needs."""
        return {"Host": self._platform.netloc or "", **(self._proxy_headers if self._is_forwarded else {})}

    def open(self) -> HTTPConnection:
        """Return a new connection that is ready for a request; no byte of a request has been sent.

        Raises:
            urllib3.exceptions.HTTPError, HTTPException, OSError, ValueError: the connection cannot be made;
                ``HTTPTransport`` translates them.
        """
        connection = self._new_connection()
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        return connection

    @property
    def _is_forwarded(self) -> bool:
        return self._proxy is not None and self._platform.scheme == "http"

    def _new_connection(self) -> HTTPConnection:
        first = self._proxy or self._platform
        arguments: dict[str, Any] = {"timeout": self._connect_timeout_s}
        if self._proxy is not None:
            arguments["proxy"] = self._proxy
            arguments["proxy_config"] = ProxyConfig(self._tls, False, None, None)
        assert first.host is not None  # checked by the settings and by environment_proxy
        host = first.host.strip("[]")
        if "https" not in {first.scheme, self._platform.scheme}:
            return HTTPConnection(host, first.port or 80, **arguments)
        port = first.port or (443 if first.scheme == "https" else 80)
        connection = HTTPSConnection(host, port, ssl_context=self._tls, **arguments)
        if self._proxy is not None and not self._is_forwarded:
            connection.set_tunnel(
                (self._platform.host or "").strip("[]"),
                self._platform.port or 443,
                self._proxy_headers,
                scheme=self._proxy.scheme or "http",
            )
        return connection


def _proxy_headers(proxy: Url) -> dict[str, str]:
    try:
        return HTTPAdapter().proxy_headers(proxy.url)
    except UnicodeEncodeError:
        line = "user name and password of the environment's proxy must be Latin-1, since they travel in a header"
        raise SettingsError([line]) from None


def _tls_context(authorities: str | bool) -> ssl.SSLContext:
    path = DEFAULT_CA_BUNDLE_PATH if isinstance(authorities, bool) else authorities
    is_folder = Path(path).is_dir()
    try:
        return ssl.create_default_context(cafile=None if is_folder else path, capath=path if is_folder else None)
    except (OSError, ssl.SSLError) as exc:
        raise SettingsError([f"the certificate authorities that the environment names cannot be read: {path}"]) from exc
