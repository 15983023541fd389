"""Which node of the broker is dialled when, with real connections."""

import asyncio
import errno
import math
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from unittest.mock import Mock
from urllib.parse import urlsplit

import pytest
from pydantic import SecretStr

from tests.support.proxies import raw_server, with_local_port
from tests.support.waiting import PATIENCE_S
from worker.amqp import dialing
from worker.amqp.address import BrokerAddress
from worker.amqp.channel import BrokerChannel
from worker.amqp.connection import connection_parameters
from worker.amqp.dialing import Dialled, Dialler
from worker.dev.services.ports import free_port


@pytest.fixture
def hung(broker_url: str) -> Iterator[str]:
    """A node that accepts TCP connections and never answers."""
    with raw_server(_say_nothing) as url:
        yield with_local_port(broker_url, urlsplit(url).port or 0)


def _say_nothing(client: socket.socket) -> None:
    while client.recv(4096):
        pass


def look_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the loop know all addresses, so that the order of the dials does not depend on its threads."""

    async def look_up(host: str, port: int, **_: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)


@asynccontextmanager
async def dialled(dialler: Dialler, urls: Sequence[str], limit_s: float = PATIENCE_S) -> AsyncIterator[Dialled]:
    found = await dialler.dial(connection_parameters(BrokerAddress([SecretStr(url) for url in urls])), "test", limit_s)
    yield found
    if found.channel is not None:
        await found.channel.close()


async def test_the_first_node_is_used_while_it_answers(
    broker_url: str, hung: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up_at_once(monkeypatch)
    monkeypatch.setattr(dialing, "HEAD_START_S", PATIENCE_S)
    async with dialled(Dialler(), [broker_url, hung]) as found:
        assert str(found.node).endswith(f":{urlsplit(broker_url).port}")
        assert found.failures == {}


async def test_a_node_that_was_slow_is_dialled_last_from_then_on(
    broker_url: str, hung: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up_at_once(monkeypatch)
    dialler = Dialler()
    async with dialled(dialler, [hung, broker_url]) as found:
        assert str(found.node).endswith(f":{urlsplit(broker_url).port}")
        assert list(found.failures.values()) == ["no answer within 0.5 s"]
    monkeypatch.setattr(dialing, "HEAD_START_S", PATIENCE_S)  # so that the second is dialled only if the first fails
    async with dialled(dialler, [hung, broker_url]) as found:
        assert found.failures == {}


async def test_a_node_whose_session_was_lost_is_dialled_last(
    broker_url: str, hung: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up_at_once(monkeypatch)
    dialler = Dialler()
    async with dialled(dialler, [broker_url]) as found:
        assert found.node is not None
        dialler.demote(found.node)
    async with dialled(dialler, [broker_url, hung]) as found:  # the other one is dialled first by now
        assert list(found.failures.values()) == ["no answer within 0.5 s"]


async def test_a_node_that_refuses_is_followed_at_once(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialing, "HEAD_START_S", 2 * PATIENCE_S)
    refusing = with_local_port(broker_url, free_port())
    async with dialled(Dialler(), [refusing, broker_url]) as found:
        assert found.channel is not None
        [reason] = found.failures.values()
        assert reason == "the connection was refused: nothing listens there"


async def test_where_no_node_answers_the_reason_of_each_is_told(broker_url: str, hung: str) -> None:
    """One that hangs, one that refuses, and one whose name nobody knows."""
    refusing = with_local_port(broker_url, free_port())
    unknown = "amqp://guest:guest@onenet.invalid:5672/"
    async with dialled(Dialler(), [hung, refusing, unknown], limit_s=1) as found:
        assert found.channel is None
        assert len(found.failures) == 3
        unresolved = found.failures["amqp://onenet.invalid:5672"]
        assert unresolved.startswith(
            ("the name onenet.invalid cannot be resolved", "the name onenet.invalid could not")
        )


async def test_a_connection_that_is_given_up_while_it_connects_leaves_nothing_behind(
    hung: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it was doing: pika's own timer of the whole attempt ends later, and must find nothing to do."""
    loop, errors = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _loop, context: errors.append(context))
    [parameters] = connection_parameters(BrokerAddress([SecretStr(hung)]))
    parameters.stack_timeout = PATIENCE_S
    for turns in range(12):
        opening = asyncio.ensure_future(BrokerChannel().open(parameters, "test"))
        for _ in range(turns):
            await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
    ended = loop.create_future()
    loop.call_later(2 * PATIENCE_S, ended.set_result, None)  # behind the last of pika's timers
    loop.slow_callback_duration = math.inf  # the clock's jump is no slow callback
    now = loop.time
    monkeypatch.setattr(loop, "time", lambda: now() + 3 * PATIENCE_S)
    await ended
    assert errors == []


async def test_an_address_for_which_no_socket_can_be_made_is_one_that_fails(
    broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one of IPv6 on a machine without it; pika lets that error through."""
    no_socket = OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
    monkeypatch.setattr("pika.adapters.utils.connection_workflow.socket.socket", Mock(side_effect=no_socket))
    async with dialled(Dialler(), [broker_url]) as found:
        assert found.channel is None
        [reason] = found.failures.values()
        assert "Address family not supported" in reason


async def test_a_node_that_was_dialled_just_before_another_answered_was_not_slow(
    broker_url: str, hung: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialing, "HEAD_START_S", PATIENCE_S)
    refusing = with_local_port(broker_url, free_port())
    dialler = Dialler()
    async with dialled(dialler, [refusing, broker_url, hung]) as found:
        assert found.failures.keys() == {f"amqp://127.0.0.1:{urlsplit(refusing).port}"}
