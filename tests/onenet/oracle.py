"""A second implementation of "send one POST", on requests: slow, boring, and independent of the transport."""

from dataclasses import dataclass

import requests
import urllib3.exceptions

from worker.onenet.transport import MAX_RESPONSE_BYTES


@dataclass(frozen=True)
class Answered:
    """What a client understood of a response. ``headers``: those that the worker reads."""

    status: int
    body: bytes
    headers: dict[str, str]


HEADERS = ("retry-after", "date")


def post_with_requests(url: str, body: bytes, timeout_s: float) -> Answered | None:
    """Send one POST; None: no complete response, or none that can be read."""
    try:
        with requests.Session() as session:
            session.trust_env = False
            with session.post(url, body, timeout=timeout_s, allow_redirects=False, stream=True) as response:
                # As the network delivered it: not unzipped.
                content = b"".join(iter(lambda: response.raw.read(65536, decode_content=False), b""))
                headers = {name: response.headers[name] for name in HEADERS if name in response.headers}
                return Answered(response.status_code, content, headers) if len(content) <= MAX_RESPONSE_BYTES else None
    except (requests.RequestException, urllib3.exceptions.HTTPError):
        return None
