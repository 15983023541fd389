"""The client of OneNET's endpoint for cached Execute commands, and of its command history."""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from urllib.parse import urlencode
from zoneinfo import ZoneInfo

from pydantic_core import to_json

from worker.core.answer import Answer, Cached, InDoubt, NotSent, Refused
from worker.core.command import Command
from worker.core.credentials import Product
from worker.core.doubt_window import DoubtWindow
from worker.core.platform import CachedCommand, Candidate, DeviceHistory, FoundStates, OwnedByOthers, Sent
from worker.core.times import platform_time
from worker.core.uuids import folded_uuid
from worker.errors import HistoryUnreadable, PlatformUnusable, TLSError, TransportError
from worker.onenet.account import Account, Site
from worker.onenet.answers import foreign_answer, interpret, is_json, is_written_in, read_answer
from worker.onenet.clock import NOTABLE_S, PlatformClock
from worker.onenet.device_histories import HISTORY, START_MARGIN, DeviceHistories
from worker.onenet.errno import SUCCESS, Kind
from worker.onenet.response import Response
from worker.onenet.transport import Request

_EXECUTE = "/execute/offline"
_JSON = {"Content-Type": "application/json"}
_NO_ARGS = b"{}"
_MAX_RECENT_UUIDS = 5_000  # a duplicate response arrives soon; the store knows older uuids
_ASK_AGAIN_S = 60.0
_AGREEING_ANSWERS = 2  # that make the platform's clock certain
_CLOCK_UNIT_S = 1.0  # of a Date: the platform's clock is known no better
_TOKEN_TOLERANCE_S = 60.0
_MAX_TEXT_CHARS = 200  # of the platform's own, for a person who checks the settings
_NO_CREDENTIALS = "the product has no credentials any more"


class _RecentUuids:
    """The uuids of the latest responses, so that a response that arrives twice is noticed.

    Kept as digests, because a text may take four bytes for each character.
    """

    def __init__(self) -> None:
        self._owners: OrderedDict[bytes, bytes] = OrderedDict()  # folded uuid -> the command that got it first

    def add(self, uuid: str, scoped_id: str) -> tuple[bool, bool]:
        """Record the uuid that a command got; tells whether it is new, and whether it is another command's."""
        key = _digest(folded_uuid(uuid))  # two uuids that differ only in case: treating them as one is the safe side
        owner, former = _digest(scoped_id), self._owners.get(key)
        if former is None:
            self._owners[key] = owner
            if len(self._owners) > _MAX_RECENT_UUIDS:
                self._owners.popitem(last=False)
        return former is None, former not in {None, owner}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class OneNETClient:
    """Sends each Execute command once, and reads the device's history for a command whose response was lost.

    Args:
        products: the products by name; the one under None is for commands that name no product.
        new_site: reaches the platform at a URL.
        platform_zone: the zone of the platform's local time.
        request_s: longest duration of one request, in seconds.
        histories: reads the histories.
    """

    def __init__(
        self,
        products: Mapping[str | None, Product],
        new_site: Callable[[str], Site],
        platform_zone: ZoneInfo,
        histories: DeviceHistories,
        *,
        request_s: float,
    ) -> None:
        self._new_site = new_site
        self._sites: dict[str, Site] = {}  # by URL
        self._zone = platform_zone
        self._histories = histories
        self._request_s = request_s
        self._accounts: dict[str | None, Account] = {}
        self._proven: set[str | None] = set()  # products with a command accepted in the configured generation
        self.replace_products(products)
        self._recent_uuids = _RecentUuids()

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
            name: Account.of(product, self._sites[product.url]) if name in changed else former[name]
            for name, product in products.items()
        }
        self._proven -= changed
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
        sent = await self._execute(command, account, not_after, omit_valid_time=_has_begun(command, account.clock, 0))
        has_begun = not sent.valid_time_omitted and _has_begun(command, account.clock, _CLOCK_UNIT_S)
        if _is_refused_content(sent.answer) and has_begun and time.monotonic() < not_after:
            return await self._execute(command, account, not_after, omit_valid_time=True)
        return sent

    async def _execute(self, command: Command, account: Account, not_after: float, *, omit_valid_time: bool) -> Sent:
        request = self._request(command, account, omit_valid_time=omit_valid_time)
        deadline = min(time.monotonic() + self._request_s, not_after)
        secrets = (*account.headers().values(), *account.transport.secrets)
        answers: list[Answer] = []
        sent_at = datetime.now(UTC)

        def is_unique(response: Response) -> bool:
            """Interpret the response before its connection is reused: the next request must not read a duplicate."""
            now = datetime.now(UTC)
            is_proven = command.product in self._proven
            answer = interpret(replace(response, secrets=secrets), account.dialect, now, is_proven=is_proven)
            is_new = False
            if isinstance(answer, Cached):
                if not is_proven and is_written_in(account.dialect, response):
                    self._proven.add(command.product)
                is_new, is_of_another = self._recent_uuids.add(answer.uuid, command.scoped_id)
                if is_of_another:
                    answer = InDoubt("the response has the uuid of another command", is_outage=False)
            if is_new or is_json(response):
                known_s = account.clock.offset_s
                account.clock.observe(response, sent_at, now)
                if _is_refused_key(answer) and abs(account.clock.offset_s - known_s) > _TOKEN_TOLERANCE_S:
                    answer = NotSent("the token was signed for another time: the platform's clock was not known")
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

        Raises:
            HistoryUnreadable: the history could not be read in full.
        """
        return await self._histories.find_candidates(self._account_of(command.product), command, doubt, owned_by_others)

    async def count_waiting(self, command: Command, most: int) -> int:
        """Return how many commands wait at the platform for a command's device; counts no further than ``most``.

        Raises:
            HistoryUnreadable: the history could not be read far enough.
        """
        return await self._histories.count_waiting(self._account_of(command.product), command, most)

    async def find_states(
        self,
        product: str | None,
        imei: str,
        since: datetime | None,
        uuids: Collection[str],
        acquire: Callable[[], Awaitable[None]] | None,
    ) -> FoundStates:
        """Return what a device's history says of cached commands."""
        try:
            account = self._account_of(product)
        except HistoryUnreadable as exc:
            return FoundStates({}, exc)
        return await self._histories.find_states(account, imei, since, uuids, acquire)

    async def list_commands(
        self,
        product: str | None,
        imei: str,
        *,
        newest_first: bool,
        is_enough: Callable[[Sequence[CachedCommand]], bool],
    ) -> DeviceHistory:
        """Return the cached commands of a device; see ``DeviceHistories.list_commands``."""
        account = self._account_of(product)
        return await self._histories.list_commands(
            account, product, imei, newest_first=newest_first, is_enough=is_enough
        )

    async def cancel(self, product: str | None, imei: str, uuid: str) -> str | None:
        """Ask the platform to cancel one command of a device; see ``DeviceHistories.cancel``."""
        return await self._histories.cancel(self._account_of(product), product, imei, uuid)

    async def time_for(self, command: Command) -> datetime:
        """Return the time by which a command counts as expired, as ``now`` does.

        The platform is asked for its time, at most once a minute, where too little is known: before a ``valid_time`` is
        sent or left out, and before a command counts as expired.
        """
        account = self._accounts.get(command.product)
        if account is not None and _needs_clock(command, account.clock):
            async with account.clock.asking:  # the commands of this moment wait for one answer
                if time.monotonic() - account.clock.asked_at > _ASK_AGAIN_S:
                    account.clock.asked_at = time.monotonic()
                    await self._ask_time(account, command)
        return self.now(command.product)

    async def _ask_time(self, account: Account, command: Command) -> None:
        for _ in range(_AGREEING_ANSWERS):
            if _needs_clock(command, account.clock):
                with suppress(HistoryUnreadable):
                    await self._histories.read_clock(account, command)

    def now(self, product: str | None) -> datetime:
        """Return the time on the clock of a product's platform, aware; while that is not certain, ours if earlier."""
        account = self._accounts.get(product)
        return datetime.now(UTC) if account is None else account.clock.earliest_now()

    def clock_offsets_s(self) -> dict[str | None, float]:
        """Return for each product the seconds by which its platform's clock is ahead of ours."""
        return {name: account.clock.offset_s for name, account in self._accounts.items()}

    async def check(self, product_name: str | None, imei: str) -> str:
        """Read a device's history, which changes nothing; returns a description of the success.

        Raises:
            PlatformUnusable: the platform cannot be reached, or answers anything but success.
        """
        account = self._accounts[product_name]
        dialect, sent_at = account.dialect, datetime.now(UTC)
        response = await self._get_history(account, imei)
        status, answer = response.status, read_answer(response.body, dialect)
        offset_s = account.clock.offset_by(response, sent_at, datetime.now(UTC))
        is_far = offset_s is not None and abs(offset_s) > _TOKEN_TOLERANCE_S
        if is_far and answer is not None and answer.code != SUCCESS and answer.kind is Kind.CREDENTIALS:
            account.clock.observe(response, sent_at, datetime.now(UTC))  # a token is signed for its time then
            response = await self._get_history(account, imei)
            status, answer = response.status, read_answer(response.body, dialect)
        if answer is None or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise PlatformUnusable(_http_fault(response))
        text = answer.dialect.error(answer.code, response.one_line(answer.text, _MAX_TEXT_CHARS))
        if answer.dialect is not dialect:
            raise PlatformUnusable(f"{foreign_answer(answer.dialect, dialect)}; {text}")
        note = _clock_note(offset_s)
        if answer.code != SUCCESS:
            raise PlatformUnusable(f"{_fault(answer.kind, imei)}: {text}{note}")
        if status != HTTPStatus.OK:
            raise PlatformUnusable(f"answers HTTP {status} with {dialect.code_name} 0, and not as OneNET does")
        return f"credentials accepted ({dialect.generation}){note}"

    async def _get_history(self, account: Account, imei: str) -> Response:
        since = platform_time(datetime.now(UTC) - START_MARGIN, self._zone)
        path = f"{account.dialect.path_prefix}{HISTORY}?{urlencode({'imei': imei, 'start': since})}"
        try:
            return await account.reader.get(path, account.headers(), time.monotonic() + self._request_s)
        except TLSError as exc:
            raise PlatformUnusable(f"TLS failed: {exc.reason}") from exc
        except TransportError as exc:
            raise PlatformUnusable(f"cannot be reached: {exc.reason}") from exc

    def _account_of(self, product: str | None) -> Account:
        account = self._accounts.get(product)
        if account is None:
            raise HistoryUnreadable(_NO_CREDENTIALS)
        return account

    def _request(self, command: Command, account: Account, *, omit_valid_time: bool) -> Request:
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


def _needs_clock(command: Command, clock: PlatformClock) -> bool:
    """Tell whether the platform's clock has to be known better before this command's times are decided."""
    if command.expires_at <= clock.now():
        return not clock.is_certain
    return command.valid_at is not None and not clock.is_agreed


def _has_begun(command: Command, clock: PlatformClock, tolerance_s: float) -> bool:
    """Tell whether a command's ``valid_time`` has passed for the platform, which accepts only a later one."""
    now = clock.now() + timedelta(seconds=tolerance_s)
    return command.valid_at is not None and command.valid_at <= now


def _is_refused_content(answer: Answer) -> bool:
    """Tell whether the platform itself refused what the command says: it was not cached, and may be if it says less.

    A refusal by something in front of the platform, or in the form of the other generation, proves too little for that.
    """
    if not isinstance(answer, Refused) or answer.code != "onenet_rejected":
        return False
    return not (answer.is_misconfigured or answer.may_concern_all_devices)


def _is_refused_key(answer: Answer) -> bool:
    return isinstance(answer, Refused) and answer.code == "onenet_rejected" and answer.may_concern_all_devices


def _clock_note(offset_s: float | None) -> str:
    """Tell a person who checks the settings about the platform's clock."""
    if offset_s is None:
        return "; the platform does not tell its time"
    if abs(offset_s) <= NOTABLE_S:
        return ""
    direction = "ahead of" if offset_s > 0 else "behind"
    return f"; the platform's clock is {abs(offset_s):,.0f} s {direction} this machine's: commands expire by it"


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
