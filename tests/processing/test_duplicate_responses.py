"""Commands whose response has the uuid of another command: what their replies say, on both stores."""

from collections.abc import Sequence
from datetime import UTC, datetime

import pytest

from tests.support.duplicating_server import DuplicatingServer
from tests.support.engine import (
    Engine,
    ScriptedPlatform,
    a_copy,
    a_task,
    expect,
    expect_reconciliation,
    failure_of,
    reply_of,
)
from tests.support.onenet_client import onenet_client
from tests.support.proxies import raw_server
from tests.support.stores import NOW
from worker.core.answer import Cached
from worker.core.claims import IdempotencyStore, Unseen
from worker.core.decide import InDoubtMode
from worker.core.doubt_window import DoubtWindow
from worker.core.resolution import AwaitReconciliation, Conclude, Replaced, Resolution
from worker.processing.unstarted import key_of

COMMANDS = 200
UUID_FORMS = ["00000000-0000-4000-8000-000000000000", "42742677"]
UUID = UUID_FORMS[0]


def expect_doubt(resolution: Resolution | None) -> AwaitReconciliation:
    """Return the resolution of a command that gets no reply and is in doubt."""
    waiting = expect_reconciliation(resolution)
    assert waiting.doubt.since is not None
    assert waiting.doubt.since <= waiting.doubt.until <= datetime.now(UTC)
    return waiting


async def test_every_reply_is_correct_when_the_platform_sends_each_response_twice(store: IdempotencyStore) -> None:
    server = DuplicatingServer()
    replies: dict[int, tuple[str, str | None]] = {}
    with raw_server(server.serve) as url, onenet_client(url) as client:
        engine = Engine(platform=client, store=store)
        for number in range(COMMANDS):
            resolution = await engine.process(a_task(command_id=f"command-{number}", args=str(number)))
            if isinstance(resolution, Conclude):
                replies[number] = (resolution.reply.status, resolution.reply.uuid)
            else:
                expect_reconciliation(resolution)
    assert len(server.received) == len(set(server.received))
    assert replies
    for number, reply in replies.items():
        assert reply == ("accepted", server.uuid(number))


def platform_with(uuids: Sequence[str]) -> ScriptedPlatform:
    """Return a platform that accepts commands under these uuids."""
    return ScriptedPlatform([], answers=[Cached(uuid) for uuid in uuids])


@pytest.mark.parametrize("uuid", UUID_FORMS, ids=["a standard uuid", "another form"])
@pytest.mark.parametrize("is_lookalike", [True, False])
async def test_a_uuid_that_another_command_owns_is_never_in_a_reply(
    store: IdempotencyStore, uuid: str, is_lookalike: bool
) -> None:
    """The command is in doubt, as if its response had been lost."""
    engine = Engine(platform=platform_with([uuid, uuid, "its-own"]), store=store)
    assert reply_of(await engine.process(a_task())).uuid == uuid
    other = a_task(command_id="b", args="the same" if is_lookalike else "another")
    expect_doubt(await engine.process(other))
    expect_doubt(await engine.process(other))  # by its record this time
    assert (await engine.recorded(a_task())).uuid == uuid


@pytest.mark.parametrize("in_doubt", ["dead-letter", "resend"])
async def test_no_reply_has_the_uuid_of_another_command_in_mode_dead_letter_or_resend(
    store: IdempotencyStore, in_doubt: InDoubtMode
) -> None:
    engine = Engine(in_doubt, platform=platform_with([UUID, UUID, "its-own"]), store=store)
    await engine.process(a_task())
    copy = engine.copy_of(await engine.process(a_task(command_id="b")))
    resolution = await engine.process(a_task(copy, command_id="b"))
    if in_doubt == "resend":
        assert (reply_of(resolution).status, reply_of(resolution).uuid) == ("accepted", "its-own")
    else:
        assert failure_of(resolution).code == "outcome_unknown"


async def test_resend_stops_at_max_attempts_when_every_response_has_the_uuid_of_another_command(
    store: IdempotencyStore,
) -> None:
    engine = Engine("resend", platform=(platform := platform_with([UUID] * 9)), store=store)
    await engine.process(a_task())
    resolution = await engine.process(a_task(command_id="b"))
    while isinstance(resolution, AwaitReconciliation):
        resolution = await engine.process(a_task(engine.copy_of(resolution), command_id="b"))
    assert failure_of(resolution).code == "outcome_unknown"
    assert reply_of(resolution).attempts == 3
    assert len(platform.answers) == 9 - 1 - 3


async def test_a_crash_suspect_that_gets_the_uuid_of_another_command_stays_in_doubt(store: IdempotencyStore) -> None:
    """Its copy, which was published before the attempt, carries the doubt on."""
    engine = Engine(platform=platform_with([UUID, UUID]), store=store)
    await engine.process(a_task())
    suspect = a_task(a_copy(doubt=DoubtWindow(NOW, NOW), crash_count=0), command_id="b")
    # The record that a crash leaves behind: in doubt, with the delay before the reconciliation over.
    assert suspect.command is not None
    claim = await store.claim(key_of(suspect.command), NOW)
    assert isinstance(claim, Unseen)
    await store.release(claim.lease, DoubtWindow(NOW, NOW), holder_crashed=True)
    expect_doubt(expect(Replaced, await engine.process(suspect)).result)
    expect_doubt(await engine.process(a_task(command_id="b")))
