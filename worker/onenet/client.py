"""The client of OneNET's endpoint for cached Execute commands, and of its command history."""

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from urllib.parse import quote, urlencode
from zoneinfo import ZoneInfo

from pydantic_core import to_json

from schemas.onenet import HistoryDetail
from worker.core.answer import Answer, Cached, InDoubt, NotSent
from worker.core.command import Command
from worker.core.credentials import Credentials
from worker.core.doubt_window import DoubtWindow
from worker.core.platform import Candidate, OwnedByOthers, Sent
from worker.core.times import platform_time
from worker.core.uuids import folded_uuid
from worker.errors import HistoryUnreadable, PlatformUnusable, TLSError, TransportError
from worker.onenet.answers import answered_at, interpret, read_answer
from worker.onenet.authentication import Authentication, authentication
from worker.onenet.errno import SUCCESS, Kind, kind_of
from worker.onenet.history import MAX_SKEW, PER_PAGE, HistoryPages, Window, candidates, match, read_detail, read_page
from worker.onenet.history_reader import HistoryReader
from worker.onenet.transport import HTTPTransport, Request, Response

_EXECUTE = "/nbiot/execute/offline"
_HISTORY = "/nbiot/offline/history"
_MAX_DETAILS = 5_000
_MAX_RECENT_UUIDS = 5_000  # a duplicate response arrives soon; the store knows older uuids
_START_MARGIN = timedelta(hours=1)  # `start` is on the platform's clock, whose offset is not known yet
_NO_CREDENTIALS = "the product has no credentials any more"


class _RecentUuids:
    """The uuids of the latest responses, so that a response that arrives twice is noticed."""

    def __init__(self) -> None:
        self._command_ids: OrderedDict[str, str] = OrderedDict()  # folded uuid -> the command that got it first

    def add(self, uuid: str, command_id: str) -> str | None:
        """Record the uuid that a command got; returns the command that got it before, None if it is new."""
        key = folded_uuid(uuid)  # two uuids that differ only in case: treating them as one is the safe side
        former = self._command_ids.get(key)
        if former is None:
            self._command_ids[key] = command_id
            if len(self._command_ids) > _MAX_RECENT_UUIDS:
                self._command_ids.popitem(last=False)
        return former


@dataclass(frozen=True, slots=True)
class _Product:
    """One product's credentials, and its own connections, so that no product can use up those of another."""

    credentials: Credentials
    authentication: Authentication
    transport: HTTPTransport

    def headers(self) -> dict[str, str]:
        """Return the headers with the credentials."""
        return dict([self.authentication.header()])


class OneNETClient:
    """Sends each Execute command once, and reads the device's history for a command whose response was lost.

    Args:
        base_url: the platform's URL, without a trailing slash.
        products: each product's credentials; those under None are for commands that name no product.
        new_transport: makes the transport of one product.
        reader: reads the history.
        platform_zone: the zone of the platform's local time.
        request_s: longest duration of one request, in seconds.
        caching_delay_s: how long after a request ended the platform may still cache it, in seconds.
        history_window_s: how long before its end a doubt window begins if its beginning is unknown, in seconds.
    """

    def __init__(
        self,
        base_url: str,
        products: Mapping[str | None, Credentials],
        new_transport: Callable[[], HTTPTransport],
        reader: HistoryReader,
        platform_zone: ZoneInfo,
        *,
        request_s: float,
        caching_delay_s: float,
        history_window_s: float,
    ) -> None:
        self._base_url = base_url
        self._new_transport = new_transport
        self._reader = reader
        self._request_s = request_s
        self._caching_delay = timedelta(seconds=caching_delay_s)
        self._history_window = timedelta(seconds=history_window_s)
        self._products: dict[str | None, _Product] = {}
        self.replace_products(products)
        self._recent_uuids = _RecentUuids()
        self._details: OrderedDict[str, HistoryDetail] = OrderedDict()
        self._zone = platform_zone

    def replace_products(self, products: Mapping[str | None, Credentials]) -> set[str | None]:
        """Use other products from now on; returns those with new credentials. Requests in flight are not affected."""
        former = self._products
        changed = {
            name
            for name, credentials in products.items()
            if name not in former or former[name].credentials != credentials
        }
        self._products = {
            name: _Product(credentials, authentication(credentials, time.time), self._new_transport())
            if name in changed
            else former[name]
            for name, credentials in products.items()
        }
        for name, product in former.items():
            if self._products.get(name) is not product:
                product.transport.close()
        return changed

    def close(self) -> None:
        """Close the idle connections, and start no further read."""
        self._reader.close()
        for product in self._products.values():
            product.transport.close()

    def knows(self, product: str | None) -> bool:
        """Tell whether there are credentials for a product."""
        return product in self._products

    async def execute(self, command: Command, not_after: float) -> Sent:
        """Ask the platform to cache one command. Never raises for what the network or the platform do.

        Args:
            command: what to cache.
            not_after: the monotonic time after which nothing may be sent.
        """
        product = self._products.get(command.product)
        if product is None:
            return Sent(NotSent(_NO_CREDENTIALS), valid_time_omitted=False)
        now = datetime.now(UTC)
        omit_valid_time = command.valid_at is not None and command.valid_at <= now
        request = self._request(command, product, omit_valid_time=omit_valid_time)
        deadline = min(time.monotonic() + self._request_s, not_after)
        answers: list[Answer] = []

        def is_unique(response: Response) -> bool:
            """Interpret the response before its connection is reused: the next request must not read a duplicate."""
            now = datetime.now(UTC)
            made_at = answered_at(response.header("date"), now)
            answer = interpret(response.status, response.body, response.header("retry-after"), made_at)
            is_new = False
            if isinstance(answer, Cached):
                former = self._recent_uuids.add(answer.uuid, command.command_id)
                is_new = former is None
                if former not in {None, command.command_id}:
                    answer = InDoubt("the response has the uuid of another command", is_outage=False)
            answers.append(answer)
            return is_new

        try:
            await product.transport.send(request, deadline, is_unique)
        except TransportError as exc:
            is_late = time.monotonic() >= deadline
            reason = f"no complete response within {self._request_s:g} s" if is_late else exc.reason
            return Sent(InDoubt(reason) if exc.may_have_been_sent else NotSent(reason), omit_valid_time)
        [answer] = answers
        return Sent(answer, omit_valid_time)

    async def find_candidates(
        self, command: Command, doubt: DoubtWindow, owned_by_others: OwnedByOthers
    ) -> list[Candidate]:
        """Return the entries of the device's command history that may be this command, the best first.

        The whole search has the deadline of one request.

        Args:
            command: what to look for.
            doubt: when it may have been sent.
            owned_by_others: returns the uuids that are known to belong to other commands; their entries are skipped.

        Raises:
            HistoryUnreadable: the history could not be read in full. An entry that was read, but cannot be told from
                the command, is a candidate with unclear fields.
        """
        product = self._products.get(command.product)
        if product is None:
            raise HistoryUnreadable(_NO_CREDENTIALS)
        deadline = time.monotonic() + self._request_s
        pages, skew_s = await self._list(command, product, doubt.since or doubt.until - self._history_window, deadline)
        window = Window(doubt.since, doubt.until + self._caching_delay, skew_s)
        items = candidates(pages.items, command, window, self._zone)
        excluded = await owned_by_others([item.cmd_uuid for item in items if item.cmd_uuid])
        found = []
        for item in items:
            if item.cmd_uuid not in excluded:
                detail = await self._detail(item.cmd_uuid, command, product, deadline)
                candidate = match(item, detail, command, doubt, window, self._zone)
                if candidate is not None:
                    found.append(candidate)
        return found

    async def check(self, product_name: str | None, imei: str) -> str:
        """Read a device's history, which changes nothing; returns a description of the success.

        Raises:
            PlatformUnusable: the platform cannot be reached, or answers anything but errno 0.
        """
        product = self._products[product_name]
        since = platform_time(datetime.now(UTC) - _START_MARGIN, self._zone)
        path = f"{_HISTORY}?{urlencode({'imei': imei, 'start': since})}"
        try:
            response = await self._reader.get(path, product.headers(), time.monotonic() + self._request_s)
        except TLSError as exc:
            raise PlatformUnusable(f"TLS failed: {exc.reason}") from exc
        except TransportError as exc:
            raise PlatformUnusable(f"cannot be reached: {exc.reason}") from exc
        status, answer = response.status, read_answer(response.body)
        if answer is None:
            raise PlatformUnusable(_http_fault(status))
        text = f"errno {answer.errno}: {' '.join(answer.error.split())[:200]}"
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise PlatformUnusable(f"{_http_fault(status)}, {text}")
        if answer.errno != SUCCESS:
            raise PlatformUnusable(f"{_fault(kind_of(answer.errno, answer.error), imei)}: {text}")
        if status != HTTPStatus.OK:
            raise PlatformUnusable(f"answers HTTP {status} with errno 0, and not as OneNET does")
        return f"{self._base_url}: credentials accepted"

    async def _detail(self, uuid: str, command: Command, product: _Product, deadline: float) -> HistoryDetail:
        """Return the parameters of a cached command. They never change, so each detail is read once."""
        if not uuid:
            return HistoryDetail(args={})  # the platform cannot be asked for an entry without a uuid
        known = self._details.get(uuid)
        if known is not None:
            return known
        path = f"{_HISTORY}/{quote(uuid, safe='')}?{urlencode({'imei': command.imei})}"
        detail, _ = await self._reader.read_page(path, product.headers(), deadline, read_detail)
        self._details[uuid] = detail
        while len(self._details) > _MAX_DETAILS:
            self._details.popitem(last=False)
        return detail

    async def _list(
        self, command: Command, product: _Product, since: datetime, deadline: float
    ) -> tuple[HistoryPages, float]:
        """Return a device's history from ``since`` on, and the seconds by which the platform's clock is ahead."""
        query = {
            "imei": command.imei,
            "start": platform_time(since - _START_MARGIN, self._zone),
            "sort": "ASC",  # commands cached during the read are appended, and move no entry to another page
            "per_page": PER_PAGE,
        }
        pages = HistoryPages()
        asked_at = datetime.now(UTC)
        path = f"{_HISTORY}?{urlencode(query)}"
        page, server_time = await self._reader.read_page(path, product.headers(), deadline, read_page)
        skew_s = 0.0 if server_time is None else (server_time - asked_at).total_seconds()
        if abs(skew_s) > (_START_MARGIN - MAX_SKEW).total_seconds():
            raise HistoryUnreadable(f"the platform's clock is {skew_s:.0f} s away from ours")
        pages.add(page)
        for number in itertools.count(2):
            if pages.is_complete:
                break
            path = f"{_HISTORY}?{urlencode(query | {'page': number})}"
            page, _ = await self._reader.read_page(path, product.headers(), deadline, read_page)
            pages.add(page)
        return pages, skew_s

    def _request(self, command: Command, product: _Product, *, omit_valid_time: bool) -> Request:
        # Cheaper than urlencode: only the colons of the times need quoting.
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
        headers = product.headers()
        body = b""
        if command.args is not None:
            headers["Content-Type"] = "application/json"
            body = to_json({"args": command.args})
        return Request(f"{_EXECUTE}?{query}", headers, body)

    def _quoted(self, moment: datetime) -> str:
        return platform_time(moment, self._zone).replace(":", "%3A")


def _fault(kind: Kind, imei: str) -> str:
    """Explain an error of the platform to a person who checks the settings."""
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
    """Explain an HTTP status without OneNET's JSON to a person who checks the settings."""
    if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.PROXY_AUTHENTICATION_REQUIRED}:
        return f"refuses the credentials: HTTP {status}"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return f"gets too many requests, and throttles them: HTTP {status}"
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return f"is down: HTTP {status}"
    return f"answers HTTP {status}, and not as OneNET does"
