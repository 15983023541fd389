"""Keeps one publisher in service, and replaces it where the consumer need not notice.

Three faults end a publisher and not the session: the broker closed its channel over one publication, it hangs in the
routing of one, or it goes on rejecting publications. Every other fault of the present publisher is the session's.
"""

import asyncio
import itertools
import json
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from pika import URLParameters

from schemas.command import MAX_BODY_BYTES
from worker.amqp.connection import printable_address
from worker.amqp.messages import plain
from worker.amqp.publisher import SLOW_CONFIRM_S, InFlight, Publisher
from worker.amqp.suspects import Suspects, may_be_about_a_publication, sender_or_route
from worker.core.backoff import backoff_s
from worker.errors import ClosedByBroker, PublicationHung, UserRefused, WorkerError
from worker.telemetry.logs import get_logger

if TYPE_CHECKING:
    from worker.core.envelope import Sender

MAX_REJECTIONS = 3  # of one publication, or
REJECTED_S = 5.0  # for this long: then the publisher is replaced
_REPLACE_CAP_S = 60.0
_CLOSED_BASE_S, _CLOSED_CAP_S = 0.1, 10.0
# The broker routes over one channel in turn, and its time for one routing key grows exponentially with the # of a
# binding: minutes for ten words and sixteen # (measured on 3.10), in which it confirms nothing else of that channel. If
# it does not answer for this long over one channel, though it opens another one, the publisher is replaced, and each
# reply is tried over a channel of its own.
HANG_S = 10.0
# Only after this does a publication count as one over which it hangs. A quorum queue that does not answer holds up a
# channel that publishes to it for the first time too: for about 65 s (measured on 3.10).
HANG_ALONE_S = 90.0
_LOOK_S = 1.0  # between two looks at whether publications are confirmed
# A sender to whom a reply took so long to be routed gets the next ones over channels of their own for a while.
_SLOW_ROUTING_S, _SLOW_FOR_S = 2.0, 30.0
_MAX_SLOW = 1_000
_ALONE_AT_ONCE = 8  # each channel that hangs goes on for a minute after it was given up
_ALONE_BASE_S, _ALONE_CAP_S = 1.0, 30.0
# A reply that was rejected for this long is published to the exchange of unrouted replies instead. Until none has been
# for a while, so is each further rejected reply to the same system. A cluster elects new leaders of its queues in less
# time.
REFUSED_REPLY_S = 30.0
_REFUSING_S = 60.0
_MAX_REFUSING = 1_000
_RETIRE_S = 10.0  # time limit for the confirms that a replaced publisher still waits for

log = get_logger()


class PublisherSupervisor:
    """Holds the present publisher, ``current``, which callers publish with.

    Args:
        nodes: the brokers; the first publisher connects to the first, a replacement may connect to another.
        suspects: remembers over which publications the broker closed a channel or hung.
        dead_letters_exchange: a publication to this exchange can be left to the broker's own dead-lettering.
        unrouted_exchange: keeps the replies that cannot be delivered.
        on_confirmed: called with each publication that the broker confirmed.
        on_rejected: called with each publication that the broker rejected and that will be published again.
        on_blocked: called with True when the broker blocks publishing, with False when it unblocks it.
        on_fault: called with the error that ends the session.
        run_in_background: runs a coroutine until it ends or the session is closed.
    """

    def __init__(
        self,
        nodes: Sequence[URLParameters],
        suspects: Suspects,
        dead_letters_exchange: str,
        unrouted_exchange: str,
        *,
        on_confirmed: Callable[[InFlight], object],
        on_rejected: Callable[[InFlight], object],
        on_blocked: Callable[[bool], object],
        on_fault: Callable[[WorkerError], object],
        run_in_background: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._nodes = nodes
        self._suspects = suspects
        self._dead_letters_exchange = dead_letters_exchange
        self._unrouted_exchange = unrouted_exchange
        self._on_confirmed = on_confirmed
        self._on_rejected = on_rejected
        self._on_blocked = on_blocked
        self._on_fault = on_fault
        self._run_in_background = run_in_background
        self._loop = asyncio.get_running_loop()
        self._name = ""
        self._is_stopped = False
        self._was_blocked = False  # as last reported
        self._replacements = 0  # in the present series of rejections
        self._replace_not_before = 0.0
        self._last_rejected_at = 0.0
        # By sender and by routing key: until when the rejected replies to it go there.
        self._refusing: OrderedDict[Sender | str, float] = OrderedDict()
        self._alone = asyncio.Semaphore(_ALONE_AT_ONCE)
        # Of one sender, or of one route, one at a time: it takes no other one's turn.
        self._alone_by_sender: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._slow_until: OrderedDict[str, float] = OrderedDict()  # by sender or route
        self._closures = 0  # of channels, in the present series of those that no sender has caused
        self._last_closed_at = 0.0
        self._withheld: dict[str, list[InFlight]] = {}  # by the exchange to which this user may publish nothing for now
        self.current = self._new_publisher()

    async def connect(self, name: str) -> None:
        """Connect the first publisher; nothing is published before ``open``.

        Args:
            name: of the connection, in the broker's list of connections.

        Raises:
            BrokerUnavailable: the broker cannot be reached.
        """
        self._name = name
        await self.current.connect(self._nodes[0], name)

    async def open(self) -> None:
        """Begin to publish.

        Raises:
            WorkerError: the channel is lost.
        """
        await self.current.open()
        self._watch(self.current)

    @property
    def was_blocked(self) -> bool:
        """Whether the broker blocks publishing, as last reported."""
        return self._was_blocked

    @property
    def is_impaired(self) -> bool:
        """Whether the broker does not take all that is published, or is slow to confirm it."""
        return bool(self._withheld) or self.current.is_impaired

    def publish(self, item: InFlight) -> None:
        """Publish at once, over a channel of its own, or once this user may publish to that exchange again."""
        if self._may_hang(item):
            self._divert(item)
        if self._may_be_slow(item):
            self._run_in_background(self._publish_reply_alone(item))
            return
        withheld = self._withheld.get(item.publication.exchange)
        if withheld is None:
            self.current.publish(item)
        else:
            withheld.append(item)

    def stop(self) -> None:
        """Publish nothing again and replace nothing: the session is lost."""
        self._is_stopped = True
        self.current.withdraw_retries()

    def leave_to_broker(self, item: InFlight) -> bool:
        """Have the broker dead-letter the message itself instead of this publication, if that is a dead letter."""
        if item.publication.exchange != self._dead_letters_exchange:
            return False
        item.settlement.is_delivery_rejected = True
        self._on_confirmed(item)
        return True

    def _new_publisher(self) -> Publisher:
        return Publisher(self._on_confirmed, self._retry_rejected, self._report_blocked)

    def _watch(self, publisher: Publisher) -> None:
        """Report the loss of the present publisher as the session's fault, unless one publication caused it."""

        def on_lost(lost: "asyncio.Future[WorkerError]") -> None:
            if self._is_stopped:
                return
            error = lost.result()
            if publisher is not self.current:  # it was replaced: unknown whether the broker stored this
                self._publish_all(publisher.withdraw_unconfirmed())
            elif may_be_about_a_publication(error):
                self.current = self._new_publisher()
                self._run_in_background(self._find_rejected_publication(publisher, self.current, error))
            else:
                self._on_fault(error)

        publisher.channel.lost.add_done_callback(on_lost)
        self._run_in_background(self._replace_if_it_hangs(publisher))

    async def _replace_if_it_hangs(self, publisher: Publisher) -> None:
        """Watch a publisher for as long as it is in service."""
        while publisher is self.current and publisher.is_open:
            is_slow = publisher.unanswered_s > SLOW_CONFIRM_S
            if is_slow and await self._hangs(publisher, HANG_S) and publisher is self.current:
                await self._replace_hung()
            await asyncio.sleep(_LOOK_S)

    async def _hangs(self, publisher: Publisher, limit_s: float) -> bool:
        """Wait until the broker answers over a publisher's channel, or hangs; returns whether it hangs.

        A broker that is only slow to store answers at once. One that blocks publishing has said so, and one that hangs
        as a whole opens no other channel.

        Args:
            publisher: with unconfirmed publications.
            limit_s: for how long it may give no answer.

        Raises:
            WorkerError: the channel is lost.
        """
        routed = asyncio.ensure_future(publisher.until_routed())
        is_hung = False
        try:
            while not (routed.done() or is_hung):
                await asyncio.wait((routed,), timeout=limit_s)
                is_hung = not routed.done() and not publisher.is_blocked and await self._opens_another()
            if routed.done():  # perhaps meanwhile
                routed.result()
                return False
            return True
        finally:
            routed.cancel()

    async def _opens_another(self) -> bool:
        """Tell whether the broker answers over another connection."""
        other = self._new_publisher()
        try:
            await other.connect(self._nodes[0], f"{self._name} one")
            await other.open()
        except (UserRefused, ClosedByBroker):  # it may limit the connections, or the channels, of this user
            return True
        except WorkerError:
            return False
        finally:
            await other.close()
        return True

    async def _replace_hung(self) -> None:
        """Publish over another connection, and each unconfirmed reply over one of its own: one of them hangs.

        Only the routing keys of replies are a sender's choice, and may be compared with bindings of a sender's.
        """
        old = await self._put_in_service(self._nodes[0], "the broker hangs in the routing of a publication")
        if old is None:
            return
        for item in old.withdraw_unconfirmed():
            if self._is_routed_for_sender(item):
                self._run_in_background(self._publish_reply_alone(item))
            else:
                self.publish(item)
        old.channel.abort()

    async def _publish_reply_alone(self, item: InFlight) -> None:
        """Publish one reply over a channel of its own, as soon as there are few of them."""
        turn = self._alone_by_sender.setdefault(_name(item), asyncio.Lock())
        for failures in itertools.count(1):
            try:
                async with AsyncExitStack() as turns:
                    await turns.enter_async_context(turn)
                    await turns.enter_async_context(self._alone)
                    if (withheld := self._withheld.get(item.publication.exchange)) is not None:
                        withheld.append(item)
                    else:
                        await self._publish_alone(item, turns)
            except WorkerError:  # what hangs may make the broker slow, which is no reason to end the session
                await asyncio.sleep(backoff_s(failures, _ALONE_BASE_S, _ALONE_CAP_S))
            else:
                return

    async def _find_rejected_publication(self, closed: Publisher, new: Publisher, error: WorkerError) -> None:
        """Publish one by one, each over a channel of its own, what was unconfirmed when the broker closed a publisher.

        So the broker shows which publication it rejects, and the others are published unchanged. Everything else goes
        on over a new publisher meanwhile, which may be replaced in its turn.
        """
        unconfirmed = [*closed.withdraw_unconfirmed(), *closed.withdraw_retries()]
        await closed.close()
        parameters = self._nodes[0]
        try:
            await new.connect(parameters, self._name)
            await new.open()
            self._watch(new)
            self._report_blocked()
            log.warning("publisher_replaced", broker=printable_address(parameters), reason=str(error))
            for item in unconfirmed:
                if item.publication.exchange in self._withheld:
                    self.publish(item)
                else:
                    await self._publish_alone(item)
        except WorkerError as exc:
            self._on_fault(exc)

    def _next_wait_s(self) -> float:
        """Return how long to wait after a closed channel that no sender has caused: longer, the more there were."""
        now = self._loop.time()
        if now - self._last_closed_at > _REPLACE_CAP_S:
            self._closures = 0
        self._last_closed_at = now
        self._closures += 1
        return min(_CLOSED_CAP_S, _CLOSED_BASE_S * 2.0 ** min(self._closures - 1, 10))

    async def _publish_alone(self, item: InFlight, turns: AsyncExitStack | None = None) -> None:
        """Publish one item over a channel of its own, and as ``plain`` if the broker closes that channel over it.

        If nothing in it is a sender's, or is any more, it is this user who may not publish it: then it is withheld.

        Args:
            item: the broker closed the former channel over it, or over another one; or it hung.
            turns: where it hung: ended as soon as the item is routed, so that others are tried.

        Raises:
            WorkerError: the broker cannot be reached.
        """
        closures = 0
        while not self._may_hang(item):
            is_own = plain(item.publication) == item.publication
            alone = self._new_publisher()
            try:
                await alone.connect(self._nodes[0], f"{self._name} one")
            except UserRefused:  # the broker may limit the connections of this user
                await alone.close()
                if turns is not None:
                    raise
                self._suspects.note(item.settlement.delivery)
                if is_own:
                    await asyncio.sleep(self._next_wait_s())
                self.publish(InFlight(plain(item.publication), item.settlement))
                return
            refusal = await self._refusal(alone, item, turns)
            if refusal is None:
                return
            if isinstance(refusal, PublicationHung):
                if item.publication.plain_key is None:  # no sender has chosen where it goes: a queue does not answer
                    continue
                self._suspects.note_hang(item.settlement.delivery, item.publication.routing_key)
                break
            is_large = len(item.publication.body) > MAX_BODY_BYTES  # perhaps too large for this broker
            if is_own:
                if not ((closures or is_large) and self.leave_to_broker(item)):
                    self._withhold(item)
                return
            closures = self._suspects.note(item.settlement.delivery)
            if (closures > 1 or is_large) and self.leave_to_broker(item):
                return
            item = InFlight(plain(item.publication), item.settlement)
        self.publish(item)  # diverted

    async def _refusal(
        self, alone: Publisher, item: InFlight, turns: AsyncExitStack | None = None
    ) -> WorkerError | None:
        """Publish one item over a connected publisher, and close that; returns why the broker did not take the item.

        Args:
            alone: connected.
            item: what to publish.
            turns: ended as soon as the item is routed.

        Raises:
            WorkerError: the connection was lost for another reason.
        """
        try:
            await alone.open()
            alone.publish(item)
            began = self._loop.time()
            if await self._hangs(alone, HANG_ALONE_S):
                alone.withdraw_unconfirmed()
                alone.channel.abort()
                log.error("publication_hung", **_about(item), exchange=item.publication.exchange)
                return PublicationHung("the broker hangs in its routing")
            if turns is not None:
                if self._loop.time() - began > _SLOW_ROUTING_S:
                    self._note_slow(item)
                await turns.aclose()
            await alone.wait_until_confirmed()
        except WorkerError as exc:
            if not alone.in_flight or not may_be_about_a_publication(exc):
                raise
            log.warning(
                "publication_refused",
                exchange=item.publication.exchange,
                routing_key=item.publication.routing_key,
                reason=str(exc),
            )
            return exc
        finally:
            await alone.close()
        return None

    def _withhold(self, item: InFlight) -> None:
        """Publish nothing to an exchange until one item, tried alone from time to time, is not refused any more.

        Over the shared channel each refusal would withdraw, and repeat, whatever else is not confirmed yet.
        """
        exchange = item.publication.exchange
        if exchange not in self._withheld:
            self._withheld[exchange] = []
            self._run_in_background(self._try_withheld(exchange))
        self._withheld[exchange].append(item)

    async def _try_withheld(self, exchange: str) -> None:
        first = self._withheld[exchange][0]
        try:
            while True:
                await asyncio.sleep(self._next_wait_s())
                alone = self._new_publisher()
                try:
                    await alone.connect(self._nodes[0], f"{self._name} one")
                except UserRefused:  # the broker may limit the connections of this user
                    await alone.close()
                    self._publish_all(self._withheld.pop(exchange))
                    return
                if await self._refusal(alone, first) is None:
                    self._publish_all(self._withheld.pop(exchange)[1:])
                    return
        except WorkerError as exc:
            self._on_fault(exc)

    def _retry_rejected(self, item: InFlight) -> None:
        """Publish again after a backoff: nothing is acknowledged before the broker has stored its publication."""
        if self._is_stopped or self._is_diverted(item):
            return
        if len(item.publication.body) > MAX_BODY_BYTES and self.leave_to_broker(item):
            return  # held for as long as it is refused, a few of them would take all memory
        wait_s = self.current.publish_later(item)
        log.error(
            "publish_refused",
            exchange=item.publication.exchange,
            routing_key=item.publication.routing_key,
            reason="unroutable" if item.was_returned else "refused by the broker",
            retry_in_s=round(wait_s, 1),
        )
        self._on_rejected(item)
        now = self._loop.time()
        if now - self._last_rejected_at > _REPLACE_CAP_S:
            self._replacements = 0
        self._last_rejected_at = now
        has_lasted = item.rejections >= MAX_REJECTIONS or (item.first_rejected_at or now) <= now - REJECTED_S
        if has_lasted and now >= self._replace_not_before:
            # Each time later: a queue that stays full rejects what is published over any connection.
            self._replacements += 1
            self._replace_not_before = now + min(_REPLACE_CAP_S, REJECTED_S * 2**self._replacements)
            self._run_in_background(self._replace())

    def _is_diverted(self, item: InFlight) -> bool:
        """Publish a reply that its receiver's queue keeps rejecting to the exchange of unrouted replies instead.

        Otherwise a few such replies use up the prefetch, and one system with a full queue stops the commands of all
        others. Returns whether the reply was diverted.
        """
        publication, now = item.publication, self._loop.time()
        if publication.exchange == self._unrouted_exchange or publication.plain_key is None or item.was_returned:
            return False
        has_lasted = (item.first_rejected_at or now) <= now - REFUSED_REPLY_S
        # A client can change its routing key each time, and without a validated user_id its app_id too.
        receiver = (item.settlement.delivery.envelope.sender, publication.routing_key)
        if not has_lasted and all(self._refusing.get(each, 0) < now for each in receiver):
            return False
        for each in receiver:
            self._refusing[each] = now + _REFUSING_S
            self._refusing.move_to_end(each)
        while len(self._refusing) > _MAX_REFUSING:
            self._refusing.popitem(last=False)
        self._divert(item)
        self.publish(item)
        return True

    def _is_routed_for_sender(self, item: InFlight) -> bool:
        """Tell whether a publication is a reply that bindings of its sender's may get."""
        return item.publication.plain_key is not None and item.publication.exchange != self._unrouted_exchange

    def _may_hang(self, item: InFlight) -> bool:
        """Tell whether the broker lately hung in the routing of such a reply."""
        delivery, routing_key = item.settlement.delivery, item.publication.routing_key
        return self._is_routed_for_sender(item) and self._suspects.hangs(delivery, routing_key)

    def _may_be_slow(self, item: InFlight) -> bool:
        """Tell whether such a reply is being tried, or was lately slow: it must not hold up others."""
        if not (self._alone_by_sender or self._slow_until) or not self._is_routed_for_sender(item):
            return False
        turn = self._alone_by_sender.get(_name(item))
        return (turn is not None and turn.locked()) or self._slow_until.get(_name(item), 0) > self._loop.time()

    def _note_slow(self, item: InFlight) -> None:
        self._slow_until[_name(item)] = self._loop.time() + _SLOW_FOR_S
        self._slow_until.move_to_end(_name(item))
        if len(self._slow_until) > _MAX_SLOW:
            self._slow_until.popitem(last=False)

    def _divert(self, item: InFlight) -> None:
        """Have a reply published to the exchange of unrouted replies, which compares no routing keys."""
        log.error("reply_diverted", **_about(item), exchange=self._unrouted_exchange)
        item.publication = replace(item.publication, exchange=self._unrouted_exchange)
        item.rejections, item.first_rejected_at = 0, None

    async def _replace(self) -> None:
        """Publish over another connection, to another node if there is one, what the broker goes on rejecting.

        A channel that was opened in the moment in which the leader of a queue died may have every publication to that
        queue rejected for as long as that node is away, although another node leads the queue by then (measured on
        3.10).
        """
        parameters = self._nodes[self._replacements % len(self._nodes)]
        old = await self._put_in_service(parameters, "publications are refused")
        if old is None:
            return
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(_RETIRE_S):
                    await old.wait_until_confirmed()
            self._publish_all(old.withdraw_unconfirmed())
        finally:
            await old.close()

    async def _put_in_service(self, parameters: URLParameters, reason: str) -> Publisher | None:
        """Publish over another connection from now on; returns the publisher before, or None if it stays."""
        new = self._new_publisher()
        try:
            await new.connect(parameters, self._name)
            await new.open()
            if self.current.is_open:  # else it is being replaced for another reason
                old, self.current = self.current, new
                self._watch(new)
                self._report_blocked()
                log.warning("publisher_replaced", broker=printable_address(parameters), reason=reason)
                self._publish_all(old.withdraw_retries())
                return old
        except WorkerError as exc:
            log.warning("publisher_not_replaced", broker=printable_address(parameters), reason=str(exc))
        finally:
            if new is not self.current:
                await new.close()
        return None

    def _publish_all(self, items: Iterable[InFlight]) -> None:
        for item in items:
            self.publish(item)

    def _report_blocked(self) -> None:
        """Report whether the present publisher is blocked, when that has changed."""
        if self.current.is_blocked != self._was_blocked:
            self._was_blocked = self.current.is_blocked
            self._on_blocked(self._was_blocked)


def _name(item: InFlight) -> str:
    return sender_or_route(item.settlement.delivery, item.publication.routing_key)


def _about(item: InFlight) -> dict[str, Any]:
    """Return what a line of the log says of a publication, and of its command if it is a reply or a result."""
    publication = item.publication
    about = {"routing_key": publication.routing_key, "app_id": item.settlement.delivery.envelope.sender.name}
    if publication.plain_key is None:
        return about
    told = json.loads(publication.body)
    return {"command_id": told["command_id"], "imei": told["imei"], "attempt": told.get("attempts"), **about}
