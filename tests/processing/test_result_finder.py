"""Looking up results: pauses, outages, and a product that is gone. Nothing is ever sent."""

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest

from schemas.result import Result
from worker.core.pauses import Order, Pauses
from worker.core.platform import FoundStates
from worker.core.results import Awaited, EntryState
from worker.errors import HistoryUnreadable, StoreUnavailable
from worker.idempotency.memory import MemoryStore
from worker.processing.circuit_breaker import CircuitBreakers
from worker.processing.result_finder import ResultFinder

NOW = datetime(2026, 11, 22, 8, 0, tzinfo=UTC)
DELAYS_S = (60, 300)
IMEI, ANOTHER_IMEI = "865820030000001", "865820030000002"


def awaited(uuid: str = "u", *, expired_ago: timedelta = timedelta(days=-1), is_recovered: bool = False) -> Awaited:
    expires_at = NOW - expired_ago
    return Awaited(
        command_id=f"id-{uuid}",
        app_id="",
        uuid=uuid,
        imei=IMEI,
        product=None,
        accepted_at=NOW - timedelta(hours=1),
        is_recovered=is_recovered,
        expires_at=expires_at,
        last_answer_at=expires_at + timedelta(seconds=110),
        due_at=NOW,
    )


@dataclass
class Histories:
    """Answers with states, or fails."""

    states: dict[str, EntryState] = field(default_factory=dict)
    error: HistoryUnreadable | None = None
    is_known: bool = True
    time: datetime = NOW
    reads: list[set[str]] = field(default_factory=list)
    since: list[datetime | None] = field(default_factory=list)
    ahead: timedelta = timedelta(0)

    def knows(self, _product: str | None) -> bool:
        return self.is_known

    def now(self, _product: str | None) -> datetime:
        return self.time + self.ahead

    async def find_states(
        self,
        _product: str | None,
        _imei: str,
        since: datetime | None,
        uuids: Collection[str],
        acquire: Callable[[], Awaitable[None]] | None,
    ) -> FoundStates:
        if acquire is not None:
            await acquire()
        self.reads.append(set(uuids))
        self.since.append(since)
        return FoundStates(self.states, self.error)  # those of others too, as one page has them


class Store(MemoryStore):
    """Records the first result of each command, as Redis does, unless it fails."""

    def __init__(self) -> None:
        super().__init__(60, 60, began_at=NOW)
        self.results: dict[tuple[str, str, str], Result] = {}
        self.is_available = True

    async def first_results(self, found: Sequence[tuple[str, Result]]) -> list[Result]:
        if not self.is_available:
            raise StoreUnavailable("no answer")
        return [self.results.setdefault((app_id, each.command_id, each.uuid), each) for app_id, each in found]


class Bench:
    """A finder with breakers that open after three failures."""

    def __init__(self) -> None:
        self.histories = Histories()
        self.breakers = CircuitBreakers([None], 3, 5, lambda: self.seconds)
        self.history_breakers = CircuitBreakers([None], 3, 5, lambda: self.seconds, subject="history")
        self.seconds = 1000.0
        self.taken: list[str | None] = []
        self.store = Store()
        self.store_outage_s = 0.0
        self.finder = ResultFinder(
            self.histories,
            self.store,
            self.breakers,
            self.history_breakers,
            DELAYS_S,
            lambda: self.store_outage_s,
            self._acquire,
            now=lambda: self.histories.time,
        )

    async def find(self, *due: Awaited) -> list[Result | Awaited]:
        return await self.finder.find(None, IMEI, due)

    def wait(self, seconds: float) -> None:
        self.seconds += seconds
        self.histories.time += timedelta(seconds=seconds)

    async def _acquire(self, product: str | None) -> None:
        self.taken.append(product)


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def test_one_read_serves_all_commands_of_a_device(bench: Bench) -> None:
    bench.histories.states = {"u": EntryState(5, "SUCCESS"), "v": EntryState(6, "TIME_OUT"), "w": EntryState(1)}
    executed, failed, waiting = await bench.find(awaited("u"), awaited("v"), awaited("w"))
    assert isinstance(executed, Result)
    assert isinstance(failed, Result)
    assert isinstance(waiting, Awaited)
    assert (executed.result, failed.result, waiting.looks) == ("executed", "failed", 1)
    assert waiting.due_at == NOW + timedelta(seconds=DELAYS_S[1])
    assert bench.histories.reads == [{"u", "v", "w"}]
    assert bench.taken == [None]


async def test_a_pause_by_hand_holds_no_result_up(bench: Bench) -> None:
    """It stops what is sent; looks only read."""
    order = Order(id="1", kind="pause", by="alice", at=NOW)
    bench.breakers.pause_by_hand(Pauses((order,)))
    bench.histories.states = {"u": EntryState(5, "SUCCESS")}
    [found] = await bench.find(awaited("u"))
    assert isinstance(found, Result)


async def test_one_read_serves_the_commands_of_a_device_that_come_after_it(bench: Bench) -> None:
    """They were due when it began, but did not fit into what is held."""
    bench.histories.states = {"u": EntryState(1), "v": EntryState(5, "SUCCESS"), "w": EntryState(1)}
    await bench.find(awaited("u"))
    bench.histories.time += timedelta(minutes=3)
    executed, waiting, missing = await bench.find(awaited("v"), awaited("w"), awaited("x"))
    assert isinstance(executed, Result)
    assert (executed.result, executed.observed_at) == ("executed", NOW)
    assert isinstance(waiting, Awaited)
    assert (waiting.looks, waiting.due_at) == (1, bench.histories.time + timedelta(seconds=DELAYS_S[1]))
    assert isinstance(missing, Awaited)
    assert bench.histories.reads == [{"u"}, {"x"}]  # the read says nothing of x


async def test_no_read_serves_a_command_twice(bench: Bench) -> None:
    bench.histories.states = {"u": EntryState(1), "v": EntryState(1)}
    await bench.find(awaited("u"))
    [waiting] = await bench.find(awaited("v"))
    assert isinstance(waiting, Awaited)
    bench.histories.time = waiting.due_at
    await bench.find(waiting)
    assert bench.histories.reads == [{"u"}, {"v"}]


async def test_reads_are_kept_in_bounded_memory(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    monkeypatch.setattr("worker.processing.recent_reads.MAX_STATES", 10)
    bench.histories.states = {name: EntryState(1) for name in "uvwx"}
    imeis = [str(int(IMEI) + number) for number in range(5)]
    for imei in imeis:
        await bench.finder.find(None, imei, [awaited("u")])
    for imei in reversed(imeis):  # of each three further ones are known, of ten at most
        await bench.finder.find(None, imei, [awaited("v")])
    assert bench.histories.reads == 5 * [{"u"}] + 2 * [{"v"}]


async def test_the_longer_a_pause_lasts_the_later_looks_are_put_off(bench: Bench) -> None:
    """With one delay for all, everything that waits would come again and again, and be put off again."""
    await test_a_paused_product_pauses_its_looks_and_they_use_up_nothing(bench)
    probe = bench.breakers.try_acquire
    found = []
    for _ in range(3):
        bench.seconds += 100
        permit = probe(None)  # so that no look is the probe
        [later] = await bench.find(awaited())
        assert permit is not None
        permit.record_failure("down")
        permit.release()
        assert isinstance(later, Awaited)
        found.append((later.due_at - NOW).total_seconds())
    assert found == [100, 200, DELAYS_S[-1]]


async def test_a_paused_product_pauses_its_looks_and_they_use_up_nothing(bench: Bench) -> None:
    for _ in range(3):
        permit = bench.breakers.try_acquire(None)
        assert permit is not None
        permit.record_failure("down")
        permit.release()
    [later] = await bench.find(awaited(expired_ago=timedelta(days=3)))
    assert isinstance(later, Awaited)
    assert (later.looks, later.due_at) == (0, NOW + timedelta(seconds=DELAYS_S[0]))
    assert bench.histories.reads == []


async def test_looks_go_on_where_no_command_probes_a_paused_product(bench: Bench) -> None:
    """Otherwise the results of an idle worker would wait for its next command."""
    await test_a_paused_product_pauses_its_looks_and_they_use_up_nothing(bench)
    bench.seconds += 5
    bench.histories.states = {"u": EntryState(5)}
    [found] = await bench.find(awaited())
    assert isinstance(found, Result)


@pytest.mark.parametrize(
    "error",
    [HistoryUnreadable("busy", is_throttled=True, retry_after_s=0), HistoryUnreadable("busy", is_rate_limited=True)],
)
async def test_a_read_that_was_not_allowed_uses_up_no_look(bench: Bench, error: HistoryUnreadable) -> None:
    bench.histories.error = error
    [later] = await bench.find(awaited(expired_ago=timedelta(days=3)))
    assert isinstance(later, Awaited)
    assert later.looks == 0


OUTAGE = HistoryUnreadable("HTTP 503", is_outage=True)
REFUSAL = HistoryUnreadable("no such device", is_refused=True)
DAY_S = 86_400
OVERDUE = timedelta(days=3)  # all workers were stopped for so long


@pytest.mark.parametrize(
    ("error", "is_known", "patience_s"),
    [
        (OUTAGE, True, DAY_S),
        (HistoryUnreadable("busy", is_throttled=True, retry_after_s=0), True, DAY_S),
        (REFUSAL, True, 2 * DELAYS_S[-1]),
        (HistoryUnreadable("it has more than 100 pages"), True, 2 * DELAYS_S[-1]),
        (None, False, 2 * DELAYS_S[-1]),
    ],
    ids=["outage", "throttled", "deleted device", "unreadable", "product that is gone"],
)
async def test_a_history_is_unknown_once_it_cannot_be_read_for_long(
    bench: Bench, error: HistoryUnreadable | None, is_known: bool, patience_s: int
) -> None:
    """However late the first look is: it may fail for another reason, of that moment only."""
    bench.histories.error, bench.histories.is_known = error, is_known
    bench.breakers.replace([None] if is_known else [], [])
    [found] = await bench.find(awaited(expired_ago=OVERDUE))
    for seconds in (patience_s - 10, 10):
        assert isinstance(found, Awaited)
        bench.wait(seconds)
        [found] = await bench.find(found)
    assert isinstance(found, Result)
    assert found.result == "unknown"


async def test_a_history_that_can_be_read_again_decides(bench: Bench) -> None:
    bench.histories.error = REFUSAL
    [found] = await bench.find(awaited(expired_ago=OVERDUE))
    assert isinstance(found, Awaited)
    bench.wait(DAY_S)
    bench.histories.error, bench.histories.states = None, {"u": EntryState(5)}
    [found] = await bench.find(found)
    assert isinstance(found, Result)
    assert found.result == "executed"


async def test_a_look_that_our_rate_limit_does_not_allow_says_nothing_of_the_history(bench: Bench) -> None:
    bench.histories.error = HistoryUnreadable("busy", is_rate_limited=True)
    [found] = await bench.find(awaited(expired_ago=OVERDUE))
    for _ in range(3):
        assert isinstance(found, Awaited)
        assert (found.looks, found.unreadable_since) == (0, None)
        bench.wait(DAY_S)
        [found] = await bench.find(found)


async def test_a_paused_product_lets_no_command_wait_for_ever(bench: Bench) -> None:
    """A history that cannot be read keeps the pause of a worker that looks up nothing else."""
    bench.histories.error = OUTAGE
    await pause(bench)
    [found] = await bench.find(awaited(expired_ago=OVERDUE))
    assert isinstance(found, Awaited)
    assert found.looks == 0
    bench.wait(DAY_S)
    [found] = await bench.find(found)
    assert isinstance(found, Result)
    assert found.result == "unknown"


@pytest.mark.parametrize("error", [OUTAGE, REFUSAL, HistoryUnreadable("busy", is_throttled=True, retry_after_s=0)])
async def test_a_worker_whose_looks_all_fail_is_hindered_until_one_succeeds(
    bench: Bench, error: HistoryUnreadable
) -> None:
    """Another worker may be able to look."""
    bench.histories.error = error
    await bench.find(awaited())
    assert bench.finder.was_hindered()
    assert not bench.finder.was_hindered()  # not tried since
    await bench.find(awaited())
    bench.wait(100)
    bench.histories.error = None
    await bench.find(awaited())
    assert not bench.finder.was_hindered()


async def test_a_worker_without_its_store_is_hindered(bench: Bench) -> None:
    bench.store_outage_s = 1.0
    await bench.find(awaited())
    assert bench.finder.was_hindered()
    bench.store_outage_s, bench.store.is_available = 0.0, False
    bench.histories.states = {"u": EntryState(5)}
    await bench.find(awaited())
    assert bench.finder.was_hindered()
    bench.store.is_available = True
    await bench.find(awaited())
    assert not bench.finder.was_hindered()


async def test_a_worker_that_has_paused_a_product_is_hindered(bench: Bench) -> None:
    await test_a_paused_product_pauses_its_looks_and_they_use_up_nothing(bench)
    assert bench.finder.was_hindered()


async def test_a_worker_that_does_not_know_a_product_is_hindered(bench: Bench) -> None:
    bench.histories.is_known = False
    await bench.find(awaited())
    assert bench.finder.was_hindered()


async def test_one_device_whose_history_fails_again_and_again_pauses_no_other(bench: Bench) -> None:
    bench.histories.error = OUTAGE
    for _ in range(10):
        await bench.find(awaited())
    assert bench.history_breakers.allows(None)


async def pause(bench: Bench) -> None:
    """Let the reads of histories fail until they pause, and a probe be due."""
    while bench.history_breakers.allows(None):
        await bench.find(awaited())
        await bench.finder.find(None, ANOTHER_IMEI, [awaited()])
    bench.wait(1000)


async def test_deleted_devices_pause_nothing_for_others(bench: Bench) -> None:
    """They may be refused as a wrong key is: errno 1 is documented for a key that does not match the IMEI."""
    bench.histories.error = HistoryUnreadable("auth failed", is_refused=True)
    for number in range(10):
        await bench.finder.find(None, f"86582003000000{number}", [awaited()])
    assert bench.history_breakers.allows(None)
    bench.histories.error = None
    bench.histories.states = {"u": EntryState(5)}
    [found] = await bench.find(awaited())
    assert isinstance(found, Result)


async def test_a_refused_look_does_not_end_a_pause(bench: Bench) -> None:
    """Otherwise each look would be a probe, although the key is wrong."""
    bench.histories.error = HistoryUnreadable("HTTP 503", is_outage=True)
    await pause(bench)
    bench.histories.error = HistoryUnreadable("auth failed", is_refused=True)
    for _ in range(3):
        [later] = await bench.find(awaited())
        assert isinstance(later, Awaited)
        assert later.looks == 0
    assert len(bench.histories.reads) == 4  # three that failed, and one probe


@pytest.mark.parametrize(
    "error",
    [
        HistoryUnreadable("HTTP 503", is_outage=True),
        HistoryUnreadable("busy", is_rate_limited=True),
        HistoryUnreadable("busy", is_throttled=True, retry_after_s=0),
        HistoryUnreadable("it has more than 100 pages"),
    ],
)
async def test_what_was_read_before_an_error_decides(bench: Bench, error: HistoryUnreadable) -> None:
    bench.histories.states = {"u": EntryState(5, "SUCCESS")}
    bench.histories.error = error
    executed, missing = await bench.find(awaited("u"), awaited("v"))
    assert isinstance(executed, Result)
    assert executed.result == "executed"
    assert isinstance(missing, Awaited)


async def test_an_entry_that_comes_back_decides(bench: Bench) -> None:
    [missing] = await bench.find(awaited())
    assert isinstance(missing, Awaited)
    bench.histories.states = {"u": EntryState(4)}
    [found] = await bench.find(missing)
    assert isinstance(found, Result)
    assert found.result == "expired"


async def test_twins_have_a_result_each(bench: Bench) -> None:
    bench.histories.states = {"u": EntryState(5), "v": EntryState(4)}
    found = await bench.find(awaited("u"), awaited("v"))
    assert [each.result for each in found if isinstance(each, Result)] == ["executed", "expired"]


async def test_the_history_is_read_from_the_first_acceptance_on(bench: Bench) -> None:
    await bench.find(awaited("u"), awaited("v"))
    await bench.find(awaited("u"), awaited("v", is_recovered=True))
    assert bench.histories.since == [NOW - timedelta(hours=1), None]


@pytest.mark.parametrize("ahead", [timedelta(hours=-5), timedelta(hours=5)])
async def test_the_platforms_clock_decides_what_is_over_and_ours_when_to_look(bench: Bench, ahead: timedelta) -> None:
    bench.histories.ahead = ahead
    margin = timedelta(minutes=1)
    [later] = await bench.find(awaited(expired_ago=timedelta(days=1) - ahead - margin))
    assert isinstance(later, Awaited)
    assert NOW < later.due_at <= NOW + timedelta(seconds=DELAYS_S[1])
    [unknown] = await bench.find(awaited(expired_ago=timedelta(days=1) - ahead + margin))
    assert isinstance(unknown, Result)
    assert unknown.result == "unknown"


async def test_what_cannot_be_recorded_is_looked_up_again(bench: Bench) -> None:
    """Another worker may tell it too, and both must tell the same."""
    bench.histories.states, bench.store.is_available = {"u": EntryState(5)}, False
    [found] = await bench.find(awaited())
    assert isinstance(found, Awaited)
    assert (found.looks, found.due_at) == (0, NOW + timedelta(seconds=DELAYS_S[0]))


async def test_the_first_result_of_a_command_stays(bench: Bench) -> None:
    """A worker that died after it had told it may have seen another state."""
    bench.histories.states = {"u": EntryState(7)}
    due = awaited(expired_ago=timedelta(hours=1))
    [first] = await bench.find(due)
    bench.histories.states = {"u": EntryState(5, "SUCCESS")}
    assert isinstance(first, Result)
    assert (first.result, await bench.find(due)) == ("failed", [first])


async def test_nothing_is_looked_up_while_nothing_can_be_recorded(bench: Bench) -> None:
    """The longer the store is away the later it comes back: else all that wait would come again and again."""
    bench.store_outage_s = 100.0
    [found] = await bench.find(awaited())
    assert isinstance(found, Awaited)
    assert (found.looks, found.due_at) == (0, NOW + timedelta(seconds=100))
    assert bench.histories.reads == []


async def test_a_command_that_comes_before_its_valid_time_waits_without_a_look(bench: Bench) -> None:
    """A worker wrote it whose clock, or the platform's as it knew it, was ahead."""
    early = awaited().model_copy(update={"valid_at": NOW + timedelta(minutes=7)})
    assert await bench.find(early) == [early.later(NOW, 7 * 60)]
    assert bench.histories.reads == []


async def test_a_refusal_uses_up_no_look_while_the_product_is_paused(bench: Bench) -> None:
    """It may have the wrong key, and no command is there to try another."""
    bench.histories.error = HistoryUnreadable("wrong key", is_refused=True)
    for _ in range(3):
        permit = bench.breakers.try_acquire(None)
        assert permit is not None
        permit.record_failure("wrong key")
    bench.seconds += 100
    for expired_ago, looks in ((timedelta(hours=30), 0), (timedelta(days=-1), 0)):
        [found] = await bench.find(awaited(expired_ago=expired_ago))
        assert isinstance(found, Awaited)
        assert found.looks == looks
