"""The client of OneNET's endpoint for cached Execute commands, and of its command history."""

import itertools
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from http import HTTPStatus
from typing import Self, TypeVar
from urllib.parse import quote, urlencode
from zoneinfo import ZoneInfo

from pydantic_core import to_json

from schemas.onenet import HistoryDetail
from worker.core.answer import Answer, Cached, InDoubt, NotSent
from worker.core.command import Command
from worker.core.credentials import Product
from worker.core.doubt_window import DoubtWindow
from worker.core.platform import Candidate, OwnedByOthers, Sent
from worker.core.times import platform_time
from worker.core.uuids import folded_uuid
from worker.errors import HistoryUnreadable, PlatformUnusable, TLSError, TransportError
from worker.onenet.answers import DIALECTS, foreign_answer, interpret, read_answer
from worker.onenet.authentication import Authentication, authentication
from worker.onenet.dialect import Dialect
from worker.onenet.errno import SUCCESS, Kind
from worker.onenet.history import MAX_SKEW, PER_PAGE, HistoryPages, Window, candidates, match, read_detail, read_page
from worker.onenet.history_reader import HistoryReader
from worker.onenet.response import Response
from worker.onenet.search_time import SearchTime
from worker.onenet.transport import HTTPTransport, Request

_EXECUTE = "/execute/offline"
_HISTORY = "/offline/history"
_JSON = {"Content-Type": "application/json"}
_NO_ARGS = b"{}"
_MAX_DETAILS = 5_000
_MAX_RECENT_UUIDS = 5_000  # a duplicate response arrives soon; the store knows older uuids
_START_MARGIN = timedelta(hours=1)  # `start` is on the platform's clock, whose offset is not known yet
_NO_CREDENTIALS = "the product has no credentials any more"

Model = TypeVar("Model")


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
class Site:
    """The platform at one URL. ``new_transport``: makes the transport of one product; ``reader``: reads histories."""

    new_transport: Callable[[], HTTPTransport]
    reader: HistoryReader


@dataclass(frozen=True, slots=True)
class _Account:
    """One product at the platform, with its own connections, so that no product can use up those of another."""

    product: Product
    dialect: Dialect
    authentication: Authentication
    transport: HTTPTransport
    reader: HistoryReader

    @classmethod
    def of(cls, product: Product, site: Site) -> Self:
        dialect = DIALECTS[product.api]
        signing = authentication(product.credentials, dialect.signing_version, time.time)
        return cls(product, dialect, signing, site.new_transport(), site.reader)

    def headers(self) -> dict[str, str]:
        """Return the headers with the credentials."""
        return dict([self.authentication.header()])


class OneNETClient:
    """Sends each Execute command once, and reads the device's history for a command whose response was lost.

    Args:
        products: the products by name; the one under None is for commands that name no product.
        new_site: reaches the platform at a URL.
        platform_zone: the zone of the platform's local time.
        request_s: longest duration of one request, in seconds.
        caching_delay_s: how long after a request ended the platform may still cache it, in seconds.
        history_window_s: how long before its end a doubt window begins if its beginning is unknown, in seconds.
        acquire: takes one request from a product's rate limit before each read of the history, and waits until that is
            allowed; None: there is no limit.
        rate_wait_s: longest wait of one search for the limit, in seconds.
    """

    def __init__(
        self,
        products: Mapping[str | None, Product],
        new_site: Callable[[str], Site],
        platform_zone: ZoneInfo,
        *,
        request_s: float,
        caching_delay_s: float,
        history_window_s: float,
        acquire: Callable[[str | None], Awaitable[None]] | None,
        rate_wait_s: float,
    ) -> None:
        self._new_site = new_site
        self._sites: dict[str, Site] = {}  # by URL
        self._request_s = request_s
        self._caching_delay = timedelta(seconds=caching_delay_s)
        self._history_window = timedelta(seconds=history_window_s)
        self._accounts: dict[str | None, _Account] = {}
        self.replace_products(products)
        self._recent_uuids = _RecentUuids()
        self._details: OrderedDict[tuple[str, str], HistoryDetail] = OrderedDict()
        self._zone = platform_zone
        self._acquire = acquire
        self._rate_wait_s = rate_wait_s

    def replace_products(self, products: Mapping[str | None, Product]) -> set[str | None]:
        """Use other products from now on; returns those that differ. Requests in flight are not affected.

        Raises:
            SettingsError: a platform cannot be reached as the environment says; the products stay as they were.
        """
        former = self._accounts
        changed = {name for name, product in products.items() if name not in former or former[name].product != product}
        for url in {product.url for product in products.values()} - self._sites.keys():
            self._sites[url] = self._new_site(url)  # kept, even without a product: reads may be in progress
        self._accounts = {
            name: _Account.of(product, self._sites[product.url]) if name in changed else former[name]
            for name, product in products.items()
        }
        for name, account in former.items():
            if self._accounts.get(name) is not account:
                account.transport.close()
        return changed

    def close(self) -> None:
        """Close the idle connections, and start no further read."""
        for site in self._sites.values():
            site.reader.close()
        for account in self._accounts.values():
            account.transport.close()

    def knows(self, product: str | None) -> bool:
        """Tell whether there are credentials for a product."""
        return product in self._accounts

    async def execute(self, command: Command, not_after: float) -> Sent:
        """Ask the platform to cache one command. Never raises for what the network or the platform do.

        Args:
            command: what to cache.
            not_after: the monotonic time after which nothing may be sent.
        """
        account = self._accounts.get(command.product)
        if account is None:
            return Sent(NotSent(_NO_CREDENTIALS), valid_time_omitted=False)
        now = datetime.now(UTC)
        omit_valid_time = command.valid_at is not None and command.valid_at <= now
        request = self._request(command, account, omit_valid_time=omit_valid_time)
        deadline = min(time.monotonic() + self._request_s, not_after)
        secrets = tuple(account.headers().values())
        answers: list[Answer] = []

        def is_unique(response: Response) -> bool:
            """Interpret the response before its connection is reused: the next request must not read a duplicate."""
            now = datetime.now(UTC)
            answer = interpret(replace(response, secrets=secrets), account.dialect, now)
            is_new = False
            if isinstance(answer, Cached):
                former = self._recent_uuids.add(answer.uuid, command.command_id)
                is_new = former is None
                if former not in {None, command.command_id}:
                    answer = InDoubt("the response has the uuid of another command", is_outage=False)
            answers.append(answer)
            return is_new

        try:
            await account.transport.send(request, deadline, is_unique)
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

        The whole search has the deadline of one request, beside its waits for the rate limit.

        Args:
            command: what to look for.
            doubt: when it may have been sent.
            owned_by_others: returns the uuids that are known to belong to other commands; their entries are skipped.

        Raises:
            HistoryUnreadable: the history could not be read in full. An entry that was read, but cannot be told from
                the command, is a candidate with unclear fields.
        """
        account = self._accounts.get(command.product)
        if account is None:
            raise HistoryUnreadable(_NO_CREDENTIALS)
        acquire = None if self._acquire is None else partial(self._acquire, command.product)
        search = SearchTime(self._request_s, acquire, self._rate_wait_s)
        pages, skew_s = await self._list(command, account, doubt.since or doubt.until - self._history_window, search)
        window = Window(doubt.since, doubt.until + self._caching_delay, skew_s)
        items = candidates(pages.items, command, window, self._zone)
        excluded = await owned_by_others([item.cmd_uuid for item in items if item.cmd_uuid])
        found = []
        for item in items:
            if item.cmd_uuid not in excluded:
                detail = await self._detail(item.cmd_uuid, command, account, search)
                candidate = match(item, detail, command, doubt, window, self._zone)
                if candidate is not None:
                    found.append(candidate)
        return found

    async def check(self, product_name: str | None, imei: str) -> str:
        """Read a device's history, which changes nothing; returns a description of the success.

        Raises:
            PlatformUnusable: the platform cannot be reached, or answers anything but success.
        """
        account = self._accounts[product_name]
        dialect = account.dialect
        since = platform_time(datetime.now(UTC) - _START_MARGIN, self._zone)
        path = f"{dialect.path_prefix}{_HISTORY}?{urlencode({'imei': imei, 'start': since})}"
        try:
            response = await account.reader.get(path, account.headers(), time.monotonic() + self._request_s)
        except TLSError as exc:
            raise PlatformUnusable(f"TLS failed: {exc.reason}") from exc
        except TransportError as exc:
            raise PlatformUnusable(f"cannot be reached: {exc.reason}") from exc
        status, answer = response.status, read_answer(response.body, dialect)
        if answer is None or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise PlatformUnusable(_http_fault(response))
        text = answer.dialect.error(answer.code, response.redacted(" ".join(answer.text.split())[:200]))
        if answer.dialect is not dialect:
            raise PlatformUnusable(f"{foreign_answer(answer.dialect, dialect)}; {text}")
        if answer.code != SUCCESS:
            raise PlatformUnusable(f"{_fault(answer.kind, imei)}: {text}")
        if status != HTTPStatus.OK:
            raise PlatformUnusable(f"answers HTTP {status} with {dialect.code_name} 0, and not as OneNET does")
        return f"{account.product.url}: credentials accepted ({dialect.generation})"

    async def _detail(self, uuid: str, command: Command, account: _Account, search: SearchTime) -> HistoryDetail:
        """Return the parameters of a cached command. They never change, so each detail is read once."""
        if not uuid:
            return HistoryDetail(args={})  # the platform cannot be asked for an entry without a uuid
        key = account.product.url, uuid
        known = self._details.get(key)
        if known is not None:
            return known
        path = f"{_HISTORY}/{quote(uuid, safe='')}?{urlencode({'imei': command.imei})}"
        detail, _ = await self._read(path, account, search, read_detail)
        self._details[key] = detail
        while len(self._details) > _MAX_DETAILS:
            self._details.popitem(last=False)
        return detail

    async def _list(
        self, command: Command, account: _Account, since: datetime, search: SearchTime
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
        page, server_time = await self._read(path, account, search, read_page)
        skew_s = 0.0 if server_time is None else (server_time - asked_at).total_seconds()
        if abs(skew_s) > (_START_MARGIN - MAX_SKEW).total_seconds():
            raise HistoryUnreadable(f"the platform's clock is {skew_s:.0f} s away from ours")
        pages.add(page)
        for number in itertools.count(2):
            if pages.is_complete:
                break
            path = f"{_HISTORY}?{urlencode(query | {'page': number})}"
            page, _ = await self._read(path, account, search, read_page)
            pages.add(page)
        return pages, skew_s

    async def _read(
        self, path: str, account: _Account, search: SearchTime, parse: Callable[[Response, Dialect], Model]
    ) -> tuple[Model, datetime | None]:
        path = account.dialect.path_prefix + path
        return await account.reader.read_page(path, account.headers(), search, account.dialect, parse)

    def _request(self, command: Command, account: _Account, *, omit_valid_time: bool) -> Request:
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
        body = _NO_ARGS if command.args is None else to_json({"args": command.args})
        return Request(f"{account.dialect.path_prefix}{_EXECUTE}?{query}", account.headers() | _JSON, body)

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


def _http_fault(response: Response) -> str:
    """Explain a response without OneNET's JSON to a person who checks the settings."""
    status, what = response.status, response.description
    if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.PROXY_AUTHENTICATION_REQUIRED}:
        return f"refuses the credentials: {what}"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return f"gets too many requests, and throttles them: {what}"
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return f"is down: {what}"
    return f"answers, but not as OneNET does: {what}"
