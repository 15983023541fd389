"""The client of OneNET's endpoint for cached Execute commands, and of the command history next to it."""

import itertools
import json
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from http.client import HTTPException
from typing import TypeVar
from urllib.parse import quote, urlencode
from zoneinfo import ZoneInfo

import requests
import urllib3

from schemas.onenet import HistoryDetail
from worker.core.answer import Answer, Cached, InDoubt, NotSent
from worker.core.backoff import backoff_s
from worker.core.command import Command
from worker.core.credentials import Credentials
from worker.core.doubt import DoubtWindow
from worker.core.platform import Candidate, OwnedByOthers, Sent
from worker.core.times import platform_time
from worker.core.uuids import folded_uuid
from worker.errors import HistoryUnreadable, PlatformUnusable
from worker.onenet.answers import http_history_error, interpret, read_answer, retry_after_s
from worker.onenet.authentication import Authentication, authentication
from worker.onenet.errno import SUCCESS, Kind, kind_of
from worker.onenet.history import (
    MAX_SKEW,
    PER_PAGE,
    HistoryPages,
    Window,
    candidates,
    match,
    read_detail,
    read_page,
)
from worker.onenet.transport import HTTPTransport, InFlightRequest, Request, Response

Model = TypeVar("Model")

_EXECUTE = "/nbiot/execute/offline"
_HISTORY = "/nbiot/offline/history"
_TRIES = 3  # for one page, within the time that there is
_MAX_DETAILS = 5_000
_MAX_ANSWERED = 5_000  # a second copy comes soon; the store knows the uuids of longer ago
_START_MARGIN = timedelta(hours=1)  # `start` is on the platform's clock, of which nothing is known yet
_write_json = json.JSONEncoder(ensure_ascii=False).encode
_TROUBLE = (requests.RequestException, urllib3.exceptions.HTTPError, HTTPException, OSError, ValueError)


class _Answered:
    """The latest uuids that commands were answered with, so that one which comes twice is noticed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._command_ids: OrderedDict[str, str] = OrderedDict()  # likeness -> the command it was the answer to

    def add(self, uuid: str, command_id: str) -> str | None:
        """Note an answer; returns the command to which this uuid was the answer before, None if it is new."""
        with self._lock:
            match_key = folded_uuid(uuid)  # a doubt is safe where two uuids differ in case alone
            former = self._command_ids.get(match_key)
            if former is None:
                self._command_ids[match_key] = command_id
                if len(self._command_ids) > _MAX_ANSWERED:
                    self._command_ids.popitem(last=False)
        return former


@dataclass(frozen=True, slots=True)
class _Product:
    """One product: what lets it in, and connections of its own, so that it cannot use up another's."""

    credentials: Credentials
    authentication: Authentication
    http: HTTPTransport


class OneNETClient:
    """Sends Execute commands, each request once, and finds out what became of one whose answer was lost.

    Args:
        base_url: the platform's URL, without a slash at the end.
        products: each product's credentials; those under None are for commands that name no product.
        new_http: makes what sends the requests of one product.
        request_s: the longest that one request may take, in seconds.
        platform_zone: the zone of the platform's local time.
        caching_delay_s: how long after its end the platform may still cache a request.
        history_window_s: how long before its end a doubt begins where nothing tells, in seconds.
    """

    def __init__(
        self,
        base_url: str,
        products: Mapping[str | None, Credentials],
        new_http: Callable[[], HTTPTransport],
        platform_zone: ZoneInfo,
        *,
        request_s: float,
        caching_delay_s: float,
        history_window_s: float,
    ) -> None:
        self._base_url = base_url
        self._new_http = new_http
        self._request_s = request_s
        self._latest_caching = timedelta(seconds=caching_delay_s)
        self._history = timedelta(seconds=history_window_s)
        self._products: dict[str | None, _Product] = {}
        self.replace_products(products)
        self._answered = _Answered()
        self._details: OrderedDict[str, HistoryDetail] = OrderedDict()
        self._zone = platform_zone

    def replace_products(self, products: Mapping[str | None, Credentials]) -> set[str | None]:
        """Take over other products; returns those whose credentials are new. What is under way goes on as it began."""
        former = self._products
        new = {
            name
            for name, credentials in products.items()
            if name not in former or former[name].credentials != credentials
        }
        self._products = {
            name: _Product(credentials, authentication(credentials, time.time), self._new_http())
            if name in new
            else former[name]
            for name, credentials in products.items()
        }
        for name, product in former.items():
            if self._products.get(name) is not product:
                product.http.close()
        return new

    def close(self) -> None:
        """Close the idle connections."""
        for product in self._products.values():
            product.http.close()

    def knows(self, product: str | None) -> bool:
        """Tell whether there are credentials for a product."""
        return product in self._products

    def execute(self, command: Command, not_after: float) -> Sent:
        """Ask the platform to cache one command. Never raises for what the network or the platform do.

        Args:
            command: what to cache.
            not_after: the monotonic time after which nothing may be sent.
        """
        product = self._products.get(command.product)
        if product is None:
            return Sent(NotSent("there are no credentials for its product any more"), valid_time_omitted=False)
        now = datetime.now(UTC)
        omit_valid_time = command.valid_at is not None and command.valid_at <= now
        request = self._request(command, product, omit_valid_time=omit_valid_time)
        exchange = InFlightRequest(deadline=min(time.monotonic() + self._request_s, not_after))
        answers: list[Answer] = []

        def is_unique(response: Response) -> bool:
            """Judge the answer while its connection is not free yet: the next request must not read its second copy."""
            now = datetime.now(UTC)
            answer = interpret(response.status, response.body, response.header("retry-after"), now)
            is_new = False
            if isinstance(answer, Cached):
                former = self._answered.add(answer.uuid, command.command_id)
                is_new = former is None
                if former not in {None, command.command_id}:
                    answer = InDoubt("its answer has the uuid of another command", is_outage=False)
            answers.append(answer)
            return is_new

        try:
            product.http.send(request, exchange, is_unique)
        except _TROUBLE as exc:
            # Not the kind of error decides but whether a byte of the request left: only if none did, none arrived.
            late = time.monotonic() >= exchange.deadline
            reason = f"no whole answer within {self._request_s:g} s" if late else _root_cause(exc)
            return Sent(InDoubt(reason) if exchange.may_have_been_sent else NotSent(reason), omit_valid_time)
        [answer] = answers
        return Sent(answer, omit_valid_time)

    def find_candidates(self, command: Command, doubt: DoubtWindow, others: OwnedByOthers) -> list[Candidate]:
        """Return the entries of the device's command history that may be this command, the best first.

        All of it together takes no longer than one request may.

        Args:
            command: what to look for.
            doubt: when it may have been sent.
            others: returns which uuids are known to belong to other commands; those need not be looked at.

        Raises:
            HistoryUnreadable: not all of it could be read. What can be read and not be told from the command is an
                entry with unclear fields.
        """
        product = self._products.get(command.product)
        if product is None:
            raise HistoryUnreadable("there are no credentials for its product any more")
        deadline = time.monotonic() + self._request_s
        listing, skew_s = self._list(command, product, doubt.since or doubt.until - self._history, deadline)
        window = Window(doubt.since, doubt.until + self._latest_caching, skew_s)
        items = candidates(listing.items, command, window, self._zone)
        known = others([item.cmd_uuid for item in items if item.cmd_uuid])
        entries = []
        for item in items:
            if item.cmd_uuid not in known:
                detail = self._detail(item.cmd_uuid, command, product, deadline)
                entry = match(item, detail, command, doubt, window, self._zone)
                if entry is not None:
                    entries.append(entry)
        return entries

    def check(self, product_name: str | None, imei: str) -> str:
        """Ask for a device's history, which changes nothing; returns the answer in words.

        Raises:
            PlatformUnusable: it cannot be reached, or answers anything but errno 0.
        """
        product = self._products[product_name]
        since = platform_time(datetime.now(UTC) - _START_MARGIN, self._zone)
        path = f"{_HISTORY}?{urlencode({'imei': imei, 'start': since})}"
        try:
            response = product.http.send(_get(path, product), InFlightRequest(time.monotonic() + self._request_s))
        except ssl.SSLError as exc:
            raise PlatformUnusable(f"TLS failed: {_root_cause(exc)}") from exc
        except _TROUBLE as exc:
            raise PlatformUnusable(f"cannot be reached: {_root_cause(exc)}") from exc
        status, answer = response.status, read_answer(response.body)
        if answer is None:
            raise PlatformUnusable(_http_fault(status))
        said = f"errno {answer.errno}: {' '.join(answer.error.split())[:200]}"
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise PlatformUnusable(f"{_http_fault(status)}, {said}")
        if answer.errno != SUCCESS:
            raise PlatformUnusable(f"{_fault(kind_of(answer.errno, answer.error), imei)}: {said}")
        if status != HTTPStatus.OK:
            raise PlatformUnusable(f"answers HTTP {status} with errno 0, and not as OneNET does")
        return f"{self._base_url}: credentials accepted"

    def _detail(self, uuid: str, command: Command, product: _Product, deadline: float) -> HistoryDetail:
        """Return how a cached command was made, which never changes, so that each is asked for once."""
        if not uuid:
            return HistoryDetail(args={})  # nothing can be asked of an entry that is not named
        known = self._details.get(uuid)
        if known is not None:
            return known
        path = f"{_HISTORY}/{quote(uuid, safe='')}?{urlencode({'imei': command.imei})}"
        detail, _ = self._read_page(path, product, deadline, read_detail)
        self._details[uuid] = detail
        while len(self._details) > _MAX_DETAILS:
            self._details.popitem(last=False)
        return detail

    def _list(
        self, command: Command, product: _Product, since: datetime, deadline: float
    ) -> tuple[HistoryPages, float]:
        """Return a device's history since then, and by how many seconds the platform's clock is ahead of ours."""
        query = {
            "imei": command.imei,
            "start": platform_time(since - _START_MARGIN, self._zone),
            "sort": "ASC",  # so that what is cached meanwhile comes last and moves nothing to another page
            "per_page": PER_PAGE,
        }
        listing = HistoryPages()
        asked_at = datetime.now(UTC)
        found, server_time = self._read_page(f"{_HISTORY}?{urlencode(query)}", product, deadline, read_page)
        skew_s = 0.0 if server_time is None else (server_time - asked_at).total_seconds()
        if abs(skew_s) > (_START_MARGIN - MAX_SKEW).total_seconds():
            raise HistoryUnreadable(f"the platform's clock is {skew_s:.0f} s away from ours")
        listing.add(found)
        for page in itertools.count(2):
            if listing.is_complete:
                break
            path = f"{_HISTORY}?{urlencode(query | {'page': page})}"
            found, _ = self._read_page(path, product, deadline, read_page)
            listing.add(found)
        return listing, skew_s

    def _read_page(
        self, path: str, product: _Product, deadline: float, read: Callable[[bytes], Model]
    ) -> tuple[Model, datetime | None]:
        """Read one page, and the time on the platform's clock at which it was given; what only reads may be repeated.

        Raises:
            HistoryUnreadable: it could not be had, however often it was tried.
        """
        request = _get(path, product)
        for tries in itertools.count(1):
            try:
                return self._get_once(request, product, deadline, read)
            except HistoryUnreadable as exc:
                wait_s = backoff_s(tries, base_s=0.1, cap_s=1)
                if tries == _TRIES or exc.retry_after_s is not None or time.monotonic() + wait_s >= deadline:
                    raise
                time.sleep(wait_s)  # in this command's own thread, which has nothing else to do
        raise AssertionError  # it counts for ever

    def _get_once(
        self, request: Request, product: _Product, deadline: float, read: Callable[[bytes], Model]
    ) -> tuple[Model, datetime | None]:
        try:
            response = product.http.send(request, InFlightRequest(deadline))
        except _TROUBLE as exc:
            raise HistoryUnreadable(_root_cause(exc), is_outage=True) from exc
        if response.status != HTTPStatus.OK:
            asked_s = retry_after_s(response.header("retry-after"), datetime.now(UTC))
            raise http_history_error(response.status, response.body, asked_s)
        return read(response.body), _date(response.header("date"))

    def _request(self, command: Command, product: _Product, *, omit_valid_time: bool) -> Request:
        # Nothing in it has to be quoted but the colons of the times, which makes urlencode dear.
        numbers = f"obj_id={command.obj_id}&obj_inst_id={command.obj_inst_id}&res_id={command.res_id}"
        query = f"imei={command.imei}&{numbers}&expired_time={self._quoted(command.expires_at)}"
        if command.valid_at is not None and not omit_valid_time:
            query += f"&valid_time={self._quoted(command.valid_at)}"
        if command.retry is not None:
            query += f"&retry={command.retry}"
        if command.timeout is not None:
            query += f"&timeout={command.timeout}"
        if command.trigger_msg is not None:
            query += f"&trigger_msg={command.trigger_msg}"
        headers = dict([product.authentication.header()])
        body = None
        if command.args is not None:
            headers["Content-Type"] = "application/json"
            body = _write_json({"args": command.args}).encode()
        return Request("POST", f"{_EXECUTE}?{query}", headers, body)

    def _quoted(self, moment: datetime) -> str:
        return platform_time(moment, self._zone).replace(":", "%3A")


def _get(path: str, product: _Product) -> Request:
    return Request("GET", path, dict([product.authentication.header()]))


def _fault(kind: Kind, imei: str) -> str:
    """Say what an error of the platform means to a person who checks the settings."""
    match kind:
        case Kind.CREDENTIALS:
            return (
                f"refuses the credentials, or device {imei} is not one of this product: name one of yours with --imei"
            )
        case Kind.THROTTLED:
            return "gets too many requests, and throttles them"
        case Kind.OUTAGE:
            return "is down"
        case Kind.DEVICE_TROUBLE:
            return f"has trouble with device {imei}"
        case Kind.LIMIT:
            return "has reached a limit"
        case Kind.DEVICE:
            return f"does not find device {imei}, or it is not online: name one of yours with --imei"
        case Kind.PARAMETER:
            return f"refuses the request for device {imei}: name one of yours with --imei"
        case Kind.UNKNOWN:
            return "answers with an unknown error"


def _http_fault(status: int) -> str:
    """Say what an HTTP status without an answer of the platform means to a person who checks the settings."""
    if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.PROXY_AUTHENTICATION_REQUIRED}:
        return f"refuses the credentials: HTTP {status}"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return f"gets too many requests, and throttles them: HTTP {status}"
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return f"is down: HTTP {status}"
    return f"answers HTTP {status}, and not as OneNET does"


def _date(value: str | None) -> datetime | None:
    try:
        moment = parsedate_to_datetime(value or "")
    except (ValueError, OverflowError):
        return None
    return moment if moment.tzinfo is not None else None


def _root_cause(error: BaseException) -> str:
    """Name what happened, without the request's URL and headers that the outer errors carry."""
    cause: BaseException = error
    while (inner := getattr(cause, "reason", None) or cause.__cause__ or cause.__context__) is not None:
        if not isinstance(inner, BaseException):
            break
        cause = inner
    text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    return f"{type(cause).__name__}: {text}"[:200]
