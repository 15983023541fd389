"""The client of OneNET's endpoint for cached Execute commands."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from urllib.parse import urlencode
from zoneinfo import ZoneInfo

import requests
import urllib3

from worker import __version__
from worker.answer import Answer, InDoubt, NotSent
from worker.commands import ExecuteCommand
from worker.onenet.answers import interpret
from worker.onenet.authentication import Authentication, authentication
from worker.onenet.http import BoundedHTTP, Exchange
from worker.settings import Credentials
from worker.times import platform_time

_EXECUTE = "/nbiot/execute/offline"
_HEADERS = {"Accept": "application/json", "User-Agent": f"onenet-execute-worker/{__version__}"}


@dataclass(frozen=True, slots=True)
class Sent:
    """The answer to one request, and what was left out of the request."""

    answer: Answer
    valid_time_omitted: bool


class OneNETClient:
    """Sends Execute commands, each request once.

    Args:
        base_url: the platform's URL, without a slash at the end.
        products: each product's credentials; those under None are for commands that name no product.
        http: sends the requests.
        platform_zone: the zone of the platform's local time.
    """

    def __init__(
        self,
        base_url: str,
        products: Mapping[str | None, Credentials],
        http: BoundedHTTP,
        platform_zone: ZoneInfo,
    ) -> None:
        self._url = base_url + _EXECUTE
        self._products: dict[str | None, Authentication] = {
            name: authentication(credentials, time.time) for name, credentials in products.items()
        }
        self._http = http
        self._zone = platform_zone

    def knows(self, product: str | None) -> bool:
        """Tell whether there are credentials for a product."""
        return product in self._products

    def execute(self, command: ExecuteCommand) -> Sent:
        """Ask the platform to cache one command. Never raises for what the network or the platform do."""
        now = datetime.now(UTC)
        omit_valid_time = command.valid_at is not None and command.valid_at <= now
        request = self._request(command, omit_valid_time=omit_valid_time)
        exchange = Exchange(deadline=time.monotonic() + self._http.total_s)
        try:
            status, response, body = self._http.send(request, exchange)
        except (requests.RequestException, urllib3.exceptions.HTTPError, HTTPException, OSError, ValueError) as exc:
            # Not the kind of error decides but whether a byte of the request left: only if none did, none arrived.
            late = time.monotonic() >= exchange.deadline
            reason = f"no whole answer within {self._http.total_s:g} s" if late else _root_cause(exc)
            return Sent(InDoubt(reason) if exchange.request_left else NotSent(reason), omit_valid_time)
        answer = interpret(status, body, response.headers.get("Retry-After"), datetime.now(UTC))
        return Sent(answer, omit_valid_time)

    def _request(self, command: ExecuteCommand, *, omit_valid_time: bool) -> requests.PreparedRequest:
        query: dict[str, str | int] = {
            "imei": command.imei,
            "obj_id": command.obj_id,
            "obj_inst_id": command.obj_inst_id,
            "res_id": command.res_id,
        }
        if command.valid_at is not None and not omit_valid_time:
            query["valid_time"] = platform_time(command.valid_at, self._zone)
        query["expired_time"] = platform_time(command.expires_at, self._zone)
        optional = {"retry": command.retry, "timeout": command.timeout, "trigger_msg": command.trigger_msg}
        query |= {name: value for name, value in optional.items() if value is not None}
        headers = dict(_HEADERS)
        body = None
        if command.args is not None:
            headers["Content-Type"] = "application/json"
            body = json.dumps({"args": command.args}, ensure_ascii=False).encode()
        headers.update([self._products[command.product].header()])
        return requests.Request("POST", f"{self._url}?{urlencode(query)}", headers=headers, data=body).prepare()


def _root_cause(error: BaseException) -> str:
    """Name what happened, without the request's URL and headers that the outer errors carry."""
    cause: BaseException = error
    while (inner := getattr(cause, "reason", None) or cause.__cause__ or cause.__context__) is not None:
        if not isinstance(inner, BaseException):
            break
        cause = inner
    text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    return f"{type(cause).__name__}: {text}"[:200]
