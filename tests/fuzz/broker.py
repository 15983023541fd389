"""Header tables through a real broker and a real worker: no message loses a session, or harms the command behind it."""

import contextlib
import json
import struct
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pika
from hypothesis import strategies as st
from pika.exceptions import AMQPError

from tests.fuzz.amqp_tables import encoded_properties, long
from tests.fuzz.mutation import mutated
from tests.fuzz.target import Check, Servers, Target
from tests.support.builders import a_command
from tests.support.deployment import Deployment
from tests.support.simulator import onenet
from tests.support.upstream import Message
from tests.support.waiting import PATIENCE_S
from tests.support.worker_process import WorkerProcess
from worker.dev.services.ports import wait_until
from worker.simulator.faults import Fault

MOST_MESSAGES = 20
_REFUSING_IMEI = (
    "865820030009999"  # the platform answers every other of its commands with 429, so that they are delayed
)
_RECONCILE_DELAY_S = 60
_COPIED_SHARE = 40  # one message in so many is for that device: each takes a second or more


def packed(messages: Sequence[bytes]) -> bytes:
    """Return the properties of several messages as one input."""
    return b"".join(map(long, messages))


def unpacked(data: bytes) -> list[bytes]:
    found = []
    while len(data) >= 4:
        end = 4 + struct.unpack_from(">I", data)[0]
        found.append(data[4:end])
        data = data[end:]
    return found


class _Raw(pika.BasicProperties):
    """Properties that are encoded already."""

    def __init__(self, encoded: bytes) -> None:
        super().__init__()
        self._raw = encoded

    def encode(self) -> list[bytes]:
        return [self._raw]


@dataclass
class _Rig:
    """One worker that runs for as long as the target, and what has been published, answered and dead-lettered."""

    deployment: Deployment
    worker: WorkerProcess
    published: int = 0
    platform_commands: int = 0
    replies: dict[str, set[tuple[str, str | None]]] = field(default_factory=dict)
    letters: set[str] = field(default_factory=set)
    log_bytes: int = 0

    def check(self, data: bytes) -> None:
        self.replies.clear()
        self.letters.clear()
        odd, innocent = [], []
        for encoded in unpacked(data)[:MOST_MESSAGES]:
            self.published += 1
            command_id = f"odd-{self.published}"
            if self._publish(_body(command_id, encoded), encoded):
                odd.append(command_id)
            innocent.append(f"innocent-{self.published}")
            self.deployment.upstream.publish(a_command(command_id=innocent[-1], args=innocent[-1]))
        # A reply may be lost to this test: its sender has chosen its id by the property message_id.
        wait_until(
            lambda: self._is_settled(odd, innocent), PATIENCE_S, f"the end of {len(odd) + len(innocent)} messages"
        )
        self._check_log()
        self._check_platform()
        for command_id in innocent:
            [(status, uuid)] = self.replies[command_id]
            assert (status, bool(uuid)) == ("accepted", True)
        for command_id in odd:
            assert len(self.replies.get(command_id, ())) <= 1, "two outcomes"

    def _publish(self, body: bytes, encoded: bytes) -> bool:
        """Publish one message; returns whether the broker took it."""
        upstream = self.deployment.upstream
        exchange = upstream.topology.commands_exchange
        try:
            upstream.channel.basic_publish(exchange, "execute", body, _Raw(encoded), mandatory=True)
        except (AMQPError, AssertionError):
            with contextlib.suppress(AMQPError):
                upstream.connection.close()
            upstream.connect()
            return False
        return True

    def _is_settled(self, odd: Sequence[str], innocent: Sequence[str]) -> bool:
        self._check_log()
        upstream = self.deployment.upstream
        while (message := upstream.try_reply()) is not None:
            self._note_reply(message)
        while (message := upstream.try_get(upstream.topology.dead_letters_exchange)) is not None:
            self.letters.add(_id_in(message.body))
        is_answered = all(each in self.replies for each in innocent)
        return is_answered and all(each in self.replies or each in self.letters for each in odd)

    def _note_reply(self, message: Message) -> None:
        reply = message.json
        if reply["command_id"] is not None:
            self.replies.setdefault(reply["command_id"], set()).add((reply["status"], reply["uuid"]))

    def _check_log(self) -> None:
        """No session was lost, and the worker said nothing unexpected of itself."""
        output = self.worker.process.output
        with output.open("rb") as file:
            file.seek(self.log_bytes)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.log_bytes += len(whole)
        events = [json.loads(line)["event"] for line in whole.splitlines()]
        assert "broker_connection_lost" not in events
        assert self.worker.process.is_running

    def _check_platform(self) -> None:
        """The platform was asked for each command at most once."""
        commands = self.deployment.simulator.platform.commands[self.platform_commands :]
        self.platform_commands += len(commands)
        named = [command.args for command in commands]
        assert len(named) == len(set(named))


def _body(command_id: str, encoded: bytes) -> bytes:
    """Return a body that is accepted, delayed, or dead-lettered for one of two reasons."""
    kind = zlib.crc32(encoded)
    changes: dict[str, Any] = {"args": command_id, "imei": str(865820030000000 + kind % 1_000)}
    if kind % _COPIED_SHARE == 0:
        changes["imei"] = _REFUSING_IMEI
    elif kind % 4 == 1:
        changes["expired_time"] = "2020-01-01T00:00:00Z"
    elif kind % 4 == 2:
        changes["retry"] = 99
    return json.dumps(a_command(command_id=command_id, **changes)).encode()


def _id_in(body: bytes) -> str:
    return str(json.loads(body)["command_id"])


class _Rigs:
    """Replaces the rig after a failure: what is left in its queues would fail the next input too."""

    def __init__(self, broker_url: str) -> None:
        self._broker_url = broker_url
        self._stack = contextlib.ExitStack()
        self._rig: _Rig | None = None

    def check(self, data: bytes) -> None:
        if self._rig is None:
            self._rig = self._new_rig()
        try:
            self._rig.check(data)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._rig = None
        self._stack.close()

    def _new_rig(self) -> _Rig:
        enter = self._stack.enter_context
        folder = Path(enter(tempfile.TemporaryDirectory(prefix="onenet-fuzz-")))
        simulator = enter(onenet(Fault(kind="too_many_requests", imei=_REFUSING_IMEI, probability=0.5, seconds=0)))
        deployment = enter(Deployment.set_up(self._broker_url, folder, simulator, reconcile_delay_s=_RECONCILE_DELAY_S))
        settings = {"ONENET_READ_TIMEOUT": "30", "WORKER_RECONCILE_DELAY": str(_RECONCILE_DELAY_S)}
        return _Rig(deployment, enter(deployment.worker(**settings)))


@contextlib.contextmanager
def _open(servers: Servers) -> Iterator[Check]:
    with contextlib.closing(_Rigs(servers.rabbitmq())) as rigs:
        yield rigs.check


_PIECES = [b"A", b"F", b"S", b"T", b"\xff", b"\0\0\0\0"]
_MESSAGES = encoded_properties() | encoded_properties() | mutated(encoded_properties(), _PIECES, most=1)
TARGET = Target("broker", st.lists(_MESSAGES, min_size=1, max_size=MOST_MESSAGES).map(packed), _open)
