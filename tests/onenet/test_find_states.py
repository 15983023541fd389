"""Reads of what became of cached commands from a real HTTP server: what is found, and in how many calls."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.support.builders import AN_IMEI, in_hours
from tests.support.onenet_client import NEVER, cache, command, onenet_client
from tests.support.simulator import onenet
from worker.core.answer import Cached
from worker.core.credentials import Generation
from worker.core.platform import FoundStates
from worker.core.results import NO_STATE
from worker.core.uuids import canonical_uuid
from worker.onenet.search_time import SearchTime
from worker.simulator.platform import Platform
from worker.simulator.server import Simulator

UUID = "42742677-adc3-54ca-83a1-5aaaf71482f8"
ANOTHER = "7c0e6d3c-1111-4222-8333-944445555666"
Page = Callable[[Mapping[str, str]], dict[str, object]]


def entry(uuid: str = UUID, send_status: object = 5, **fields: object) -> dict[str, object]:
    times = {"create_time": "2026-11-22 16:00:00", "expired_time": "2026-11-23 16:00:00"}
    return {"cmd_uuid": uuid, "type": "EXECUTE", **times, "send_status": send_status, **fields}


def page(*items: dict[str, object], total: int | None = None) -> dict[str, object]:
    return {"total_count": len(items) if total is None else total, "items": list(items)}


async def states(
    simulator: Simulator, *uuids: str, since: datetime | None = None, api: Generation = "v1"
) -> FoundStates:
    with onenet_client(simulator.url, api=api) as client:
        return await client.find_states(None, AN_IMEI, since, uuids, None)


def status(found: FoundStates, uuid: str) -> int | None:
    """Return the state of a command, None if it was not found, or says nothing."""
    return found.states.get(canonical_uuid(uuid), NO_STATE).send_status


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, str]]:
    """The queries of the pages that were read."""
    asked: list[Mapping[str, str]] = []
    history = Platform.history

    def note(platform: Platform, query: Mapping[str, str]) -> dict[str, object]:
        asked.append(query)
        return history(platform, query)

    monkeypatch.setattr(Platform, "history", note)
    return asked


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Let the platform show these pages, and then empty ones; returns the numbers of the pages that are read."""

    def show(*shown: dict[str, object]) -> list[str]:
        asked: list[str] = []

        def answer(_platform: Platform, query: Mapping[str, str]) -> dict[str, object]:
            asked.append(query["page"])
            number = int(query["page"])
            return shown[number - 1] if number <= len(shown) else page(total=int(str(shown[0]["total_count"])))

        monkeypatch.setattr(Platform, "history", answer)
        return asked

    return show


@pytest.mark.parametrize("api", ["v1", "v2"])
async def test_each_generation_tells_what_became_of_its_commands(api: Generation) -> None:
    """Some entries have a blank behind the uuid, and times with milliseconds."""
    with onenet() as simulator, onenet_client(simulator.url, api=api) as client:
        simulator.platform.replace_devices({"*": "up"})
        uuids = []
        for number in range(4):
            answer = (await client.execute(command(imei=AN_IMEI, args=str(number)), NEVER)).answer
            assert isinstance(answer, Cached)
            uuids.append(answer.uuid)
        simulator.platform.clock_offset_s = timedelta(minutes=1).total_seconds()
        found = await client.find_states(None, AN_IMEI, datetime.now(UTC), uuids, None)
    assert [(state.send_status, state.confirm_status) for state in found.states.values()] == [(5, "SUCCESS")] * 4
    assert all(state.sent_at and state.confirmed_at for state in found.states.values())


@pytest.mark.parametrize("asked", [UUID, UUID.upper(), UUID.replace("-", "")])
@pytest.mark.parametrize("shown", [UUID, UUID + " ", UUID.upper(), f"{{{UUID}}}"])
async def test_a_uuid_may_be_written_in_another_way(show: Callable[..., object], asked: str, shown: str) -> None:
    show(page(entry(shown)))
    with onenet() as simulator:
        found = await states(simulator, asked)
    assert status(found, asked) == 5


async def test_two_writings_of_one_uuid_have_one_state(show: Callable[..., object]) -> None:
    """A worker that crashed may have told one, and its successor the other."""
    show(page(entry()))
    with onenet() as simulator:
        found = await states(simulator, UUID, UUID.upper())
    assert [status(found, uuid) for uuid in (UUID, UUID.upper())] == [5, 5]


async def test_a_text_that_is_no_uuid_is_another_one_in_another_case(show: Callable[..., object]) -> None:
    """Nothing proves that they are the same."""
    show(page(entry("abc")))
    with onenet() as simulator:
        found = await states(simulator, "ABC", "abc")
    assert [status(found, uuid) for uuid in ("ABC", "abc")] == [None, 5]


async def test_an_entry_that_comes_twice_hides_no_other_one(show: Callable[..., list[str]]) -> None:
    """Its total counts it twice, so that an entry seems to be missing."""
    asked = show(page(entry(), entry()))
    with onenet() as simulator:
        found = await states(simulator, UUID, ANOTHER)
    assert [status(found, uuid) for uuid in (UUID, ANOTHER)] == [5, None]
    assert found.error is None
    assert asked == ["1", "2"]


@pytest.mark.parametrize("total", [0, 1, 5, 10**9])
async def test_a_wrong_total_hides_no_entry(show: Callable[..., object], total: int) -> None:
    show(page(entry(), entry(ANOTHER, 4), total=total))
    with onenet() as simulator:
        found = await states(simulator, UUID, ANOTHER, "missing")
    assert [status(found, uuid) for uuid in (UUID, ANOTHER, "missing")] == [5, 4, None]
    assert found.error is None


async def test_a_page_that_cannot_be_read_hides_no_entry_of_another(show: Callable[..., object]) -> None:
    full = page(*(entry(f"{number}") for number in range(99)), entry(), total=150)
    show(full, {"items": "broken"})
    with onenet() as simulator:
        found = await states(simulator, UUID, ANOTHER)
    assert status(found, UUID) == 5
    assert found.error is not None


async def test_a_history_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page has one new entry, and hundreds with the uuid that is already found."""
    asked: list[str] = []

    def answer(_platform: Platform, query: Mapping[str, str]) -> dict[str, object]:
        asked.append(query["page"])
        return page(entry(f"new-{query['page']}"), *(entry() for _ in range(500)), total=10**9)

    monkeypatch.setattr(Platform, "history", answer)
    with onenet() as simulator:
        found = await states(simulator, UUID, ANOTHER)
    assert status(found, UUID) == 5
    assert found.error is not None
    assert "bytes" in str(found.error)
    assert len(asked) < 50


@pytest.mark.parametrize("since", [timedelta(0), None])
async def test_the_newest_entries_come_first(pages: list[Mapping[str, str]], since: timedelta | None) -> None:
    """So that one call is enough, however many commands the device had in half a year."""
    with onenet() as simulator:
        for number in range(150):
            cache(simulator, command(imei=AN_IMEI), f"{number}")
        uuid = cache(simulator, command(imei=AN_IMEI), "on")
        found = await states(simulator, uuid, since=None if since is None else datetime.now(UTC) - since)
    assert status(found, uuid) == 1
    assert len(pages) == 1


async def test_what_was_cached_days_ago_is_looked_for_from_there_on(pages: list[Mapping[str, str]]) -> None:
    """However many commands the device has had since."""
    with onenet() as simulator:
        simulator.platform.clock_offset_s = -timedelta(days=3).total_seconds()
        uuid = cache(simulator, command(imei=AN_IMEI), "on")
        simulator.platform.clock_offset_s = 0
        for number in range(150):
            cache(simulator, command(imei=AN_IMEI), f"{number}")
        found = await states(simulator, uuid, since=datetime.now(UTC) - timedelta(days=3))
    assert status(found, uuid) == 1
    assert len(pages) == 1


async def test_each_page_has_the_time_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A history of many pages at a slow platform would otherwise never be read to its end."""
    renewed: list[float] = []
    monkeypatch.setattr(SearchTime, "renew", lambda _search, seconds: renewed.append(seconds))
    with onenet() as simulator:
        uuid = cache(simulator, command(imei=AN_IMEI), "on")
        for number in range(250):
            cache(simulator, command(imei=AN_IMEI), f"{number}")
        found = await states(simulator, uuid)
    assert status(found, uuid) == 1
    assert len(renewed) == 2


async def test_a_command_that_was_cached_long_before_its_reply_is_found() -> None:
    """As after the replay of a dead letter whose outcome was unknown."""
    with onenet() as simulator:
        simulator.platform.clock_offset_s = -timedelta(days=100).total_seconds()
        uuid = cache(simulator, command(imei=AN_IMEI), "on")
        simulator.platform.clock_offset_s = 0
        assert status(await states(simulator, uuid), uuid) == 1
        assert status(await states(simulator, uuid, since=datetime.now(UTC)), uuid) is None


@pytest.mark.parametrize("hours", [-20, 20])
async def test_a_worker_that_does_not_know_the_platforms_clock_yet_finds_the_entry(hours: int) -> None:
    """Its first look may be the last one."""
    with onenet() as simulator:
        simulator.platform.clock_offset_s = timedelta(hours=hours).total_seconds()
        uuid = cache(simulator, command(imei=AN_IMEI, expired_time=in_hours(72)), "on")
        found = await states(simulator, uuid, since=datetime.now(UTC))
    assert status(found, uuid) == 1


@pytest.mark.parametrize("days", [-40, 40])
async def test_a_platform_whose_clock_is_far_away_is_asked_for_a_time_that_it_accepts(days: int) -> None:
    with onenet() as simulator, onenet_client(simulator.url) as client:
        simulator.platform.clock_offset_s = timedelta(days=days).total_seconds()
        wanted = command(imei=AN_IMEI, expired_time=in_hours(60 * 24))
        answer = (await client.execute(wanted, NEVER)).answer
        assert isinstance(answer, Cached)
        for since in (None, datetime.now(UTC)):
            found = await client.find_states(None, AN_IMEI, since, [answer.uuid], None)
            assert (found.error, status(found, answer.uuid)) == (None, 1)


@pytest.mark.parametrize("written", [0, 7, 8, 99, -1, 10**30, "8", "SUCCESS", "", None, True, [5], {"5": 5}, "5" * 100])
async def test_a_state_of_any_form_can_be_read(show: Callable[..., object], written: Any) -> None:
    show(page(entry(send_status=written), entry(ANOTHER)))
    with onenet() as simulator:
        found = await states(simulator, UUID, ANOTHER)
    assert found.error is None
    assert status(found, ANOTHER) == 5
