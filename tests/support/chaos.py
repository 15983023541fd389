"""A chaos run: commands are published while a scenario causes faults, and then replies and platform are compared.

The seed decides what is published, which requests fail, and what the scenario chooses; the timing of the workers
differs from run to run.
"""

import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import pika
import requests

from tests.support.builders import a_command
from tests.support.deployment import Deployment
from tests.support.proxies import Proxy
from tests.support.simulator import onenet
from tests.support.upstream import Upstream
from tests.support.worker_process import WorkerProcess
from worker.dev.services.broker import LocalBroker
from worker.dev.services.ports import free_port, wait_until
from worker.simulator.faults import Fault
from worker.simulator.platform import Platform
from worker.simulator.server import Simulator

HEARTBEAT_S = 5
RECONCILE_DELAY_S = 3  # longer than late caching takes, as the delivery guarantees assume
_STEADY = 0.95  # share of the commands during whose replies gaps are measured
_POLL_S = 0.02
_SETTLE_S = 60  # longest wait for copies of commands that have a reply
DRAIN_S = 240  # longest wait for the last reply after the last fault
_KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "hang", "seconds": 2},
    {"kind": "drop"},
    {"kind": "drop_after_caching"},
    {"kind": "error_500"},
    {"kind": "error_500_after_caching"},
    {"kind": "error_503"},
    {"kind": "too_many_requests", "seconds": 1},
    {"kind": "errno", "errno": 5117, "error": "rpc error"},
    {"kind": "errno_after_caching", "errno": 7},
    {"kind": "garbage_after_caching"},
    {"kind": "no_uuid"},
    {"kind": "slow_drip", "seconds": 0.2},
    {"kind": "late_caching", "seconds": 2},
)
_HISTORY_KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "error_500"},
    {"kind": "drop"},
    {"kind": "garbage"},
    {"kind": "errno", "errno": 7},
)


_VIOLATIONS = (
    "lost",
    "cached_twice",
    "contradictory",
    "wrong_uuid",
    "cached_but_failed",
    "wrong_result",
    "too_many_calls",
    "unsettled",
    "grown",
)


@dataclass(frozen=True)
class Plan:
    """The size of a chaos run.

    Args:
        name: of the scenario, in the report.
        seed: of all that is drawn.
        seconds: of faults.
        commands: number of commands that are published.
        workers: number of workers.
        store_url: IDEMPOTENCY_URL; None: ``memory://``.
        concurrency: WORKER_CONCURRENCY.
        latency_s: of the platform.
        devices: number of devices; a history takes the longer to read, the more commands its device has.
        fault_probability: share of the requests that fail.
        publishing: share of the seconds in which all commands are published. With a platform that needs longer than
            that, commands always wait, so that a gap between replies is a stall of workers, broker or store.
        settings: further settings of the workers.
        keeps_records: the store loses none, so that lookalikes can be told apart.
        result_delays_s: of the looks for results; none: results are off.
    """

    name: str
    seed: int
    seconds: float
    commands: int
    workers: int
    store_url: str | None
    concurrency: int = 16
    latency_s: float = 0.01
    devices: int = 50
    fault_probability: float = 0.1
    publishing: float = 0.8
    settings: Mapping[str, str] = field(default_factory=dict)
    keeps_records: bool = True
    result_delays_s: tuple[int, ...] = ()

    @property
    def store(self) -> str:
        return "memory://" if self.store_url is None else f"{urlsplit(self.store_url).scheme}://"


@dataclass
class Report:
    """The result of a chaos run; each of the lists must be empty."""

    plan: Plan
    outcomes: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    longest_gap_s: float = 0.0
    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    cached_twice: list[str] = field(default_factory=list)
    contradictory: list[str] = field(default_factory=list)
    wrong_uuid: list[str] = field(default_factory=list)
    cached_but_failed: list[str] = field(default_factory=list)
    wrong_result: list[str] = field(default_factory=list)  # none, several, or another than the device's
    too_many_calls: list[str] = field(default_factory=list)  # of the history, for results
    unsettled: list[str] = field(default_factory=list)  # queues that are not empty at the end
    grown: list[str] = field(default_factory=list)  # what a soak used more of at the end

    @property
    def violations(self) -> dict[str, list[str]]:
        return {name: found for name in _VIOLATIONS if (found := getattr(self, name))}

    def __str__(self) -> str:
        plan = self.plan
        done = ", ".join(f"{count} {name}" for name, count in sorted(self.events.items()))
        found = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.outcomes.items()))
        wrong = ", ".join(f"{name.replace('_', ' ')} {len(getattr(self, name))}" for name in _VIOLATIONS)
        return (
            f"{plan.name}, seed {plan.seed}: {plan.workers} worker(s) on {plan.store}, {plan.commands} commands, "
            f"{self.seconds:.0f} s\n  faults: {done}\n  outcomes: {found}\n  {wrong}\n"
            f"  longest gap between replies: {self.longest_gap_s:.1f} s" + "".join(f"\n  {note}" for note in self.notes)
        )


class Fleet:
    """Workers, each with its own proxy to each node of the broker; the first worker prefers the second node."""

    def __init__(self, deployment: Deployment, plan: Plan) -> None:
        self._deployment = deployment
        self._settings = {
            "ONENET_CONNECT_TIMEOUT": "1",
            "ONENET_READ_TIMEOUT": "1",
            "WORKER_RECONCILE_DELAY": str(RECONCILE_DELAY_S),
            "WORKER_CONCURRENCY": str(plan.concurrency),
            "IDEMPOTENCY_URL": plan.store_url or "memory://",
            **plan.settings,
        }
        nodes = deployment.broker_url.split(",")
        self._proxies = [
            [Proxy(url) for url in (*nodes[turn:], *nodes[:turn])]
            for turn in ((number + 1) % len(nodes) for number in range(plan.workers))
        ]
        self._ports = [free_port() for _ in range(plan.workers)]
        self.workers: list[WorkerProcess] = []

    def start(self, python: Path | str = sys.executable) -> None:
        """Start all workers, and wait until they consume."""
        self.workers = [self._start(number, python) for number in range(len(self._proxies))]
        for worker in self.workers:
            worker.wait_for("consumer_started")

    def kill(self, number: int, python: Path | str = sys.executable) -> None:
        """Kill a worker and start another in its place."""
        self.workers[number].process.kill()
        self.workers[number] = self._start(number, python)

    def replace(self, number: int, python: Path | str) -> None:
        """Stop a worker as a rolling update does, and start another in its place."""
        process = self.workers[number].process
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        self.workers[number] = self._start(number, python)
        self.workers[number].wait_for("consumer_started")

    def cut(self, number: int) -> None:
        """Reset the connections of a worker to the broker."""
        for proxy in self._proxies[number]:
            proxy.cut()

    def unacknowledged(self) -> list[int | None]:
        """Return how many deliveries each worker holds, None if it does not tell."""
        return [_unacknowledged(port) for port in self._ports]

    def close(self) -> None:
        for worker in self.workers:
            worker.process.kill()
        for proxies in self._proxies:
            for proxy in proxies:
                proxy.close()

    def _start(self, number: int, python: Path | str) -> WorkerProcess:
        url = ",".join(f"{proxy.url}?heartbeat={HEARTBEAT_S}" for proxy in self._proxies[number])
        settings = self._settings | {"AMQP_URL": url, "HTTP_PORT": str(self._ports[number])}
        return self._deployment.start_worker(python, **settings)


def _unacknowledged(port: int) -> int | None:
    try:
        text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
    except requests.RequestException:
        return None
    found = re.search(r"^onenet_worker_unacknowledged (\S+)$", text, re.MULTILINE)
    return None if found is None else int(float(found[1]))


@dataclass
class Scene:
    """What a scenario acts on while commands are published and replies are read.

    Scenarios measure what happens in time, so their waits are of fixed lengths; nothing is awaited by them.
    """

    plan: Plan
    deployment: Deployment
    fleet: Fleet
    randomness: random.Random
    report: Report
    over: threading.Event
    began: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began

    def wait(self, seconds: float) -> None:
        """Let faults last, or the workers run without one."""
        self.over.wait(seconds)

    def note(self, event: str) -> None:
        """Count an event for the report."""
        self.report.events[event] += 1


Scenario = Callable[[Scene], None]


def run(
    plan: Plan,
    broker_url: str,
    folder: Path,
    scenario: Scenario,
    python: Path | str = sys.executable,
    describe: Callable[[], str] = str,
) -> Report:
    """Run commands through a scenario until every command has a reply, then compare replies and platform.

    Args:
        plan: the size of the run.
        broker_url: of the broker; of a cluster the URLs of its nodes, comma-separated. The upstream system of the run
            prefers the first, so a scenario must not let that one hang.
        folder: for the workers' logs.
        scenario: causes the faults.
        python: interpreter in whose environment the first workers run.
        describe: tells where messages are; called if a command has no reply.
    """
    report = Report(plan)
    randomness = random.Random(plan.seed)
    faults = [Fault(**kind, probability=plan.fault_probability / len(_KINDS)) for kind in _KINDS]
    faults += [
        Fault(**kind, probability=plan.fault_probability / len(_HISTORY_KINDS), endpoint="history")
        for kind in _HISTORY_KINDS
    ]
    began = time.monotonic()
    with ExitStack() as stack:
        simulator = stack.enter_context(onenet(*faults, latency_s=plan.latency_s, seed=plan.seed))
        deployment = stack.enter_context(
            Deployment.set_up(broker_url, folder, simulator, RECONCILE_DELAY_S, plan.result_delays_s)
        )
        reads = stack.enter_context(_counted_reads())
        devices = _Devices(simulator, randomness, plan, reads) if plan.result_delays_s else None
        _declare(deployment, plan)
        commands = list(_commands(randomness, plan))
        fleet = Fleet(deployment, plan)
        stack.callback(fleet.close)
        fleet.start(python)
        over = threading.Event()
        scene = Scene(plan, deployment, fleet, randomness, report, over)
        with ThreadPoolExecutor(2) as pool:
            faults_done = pool.submit(scenario, scene)
            publisher = _Publisher(deployment, commands, plan.seconds * plan.publishing)
            published = pool.submit(publisher.run, over)
            parts = (faults_done, published)
            try:
                replies, results = _collect(deployment, commands, report, lambda: all(map(_is_over, parts)), devices)
            finally:
                over.set()  # ends the waits of both, if the run failed
        _compare(report, commands, replies, deployment, publisher.doubled if plan.store_url is None else set())
        if devices is not None:
            devices.compare(report, replies, results)
        if report.lost:
            report.notes.append(f"workers hold {fleet.unacknowledged()} {describe()}")
        report.unsettled += _left_over(deployment, fleet)
    report.seconds = time.monotonic() - began
    return report


def _is_over(part: Future[None]) -> bool:
    """Tell whether a part of the run is over; raises what ended it."""
    if part.done():
        part.result()
        return True
    return False


def _declare(deployment: Deployment, plan: Plan) -> None:
    """Declare the topology before the first command is published; the second node of a cluster leads the queues."""
    first, *others = deployment.broker_url.split(",")
    timeouts = {"ONENET_CONNECT_TIMEOUT": "1", "ONENET_READ_TIMEOUT": "1"}
    url = ",".join([*others, first])
    with deployment.worker(**timeouts, AMQP_URL=url, WORKER_RECONCILE_DELAY=str(RECONCILE_DELAY_S)):
        pass


def _commands(randomness: random.Random, plan: Plan) -> Iterator[dict[str, Any]]:
    """Yield commands with unique args; with Redis some are yielded twice, and some with a lookalike under another id.

    Not on memory stores: after a kill no record distinguishes lookalikes, so ``outcome_unknown`` is correct, nor a
    duplicate from a redelivery. And no lookalikes where records are lost (docs/delivery-guarantees.md, "Lost records").
    """
    for number in range(plan.commands):
        imei = str(865820030000000 + number % plan.devices)
        command = a_command(command_id=f"chaos-{number}", imei=imei, args=f"chaos-{number}")
        yield command
        draw = randomness.random()
        if plan.store_url is None:
            continue
        if draw < 0.02:
            yield command  # a duplicate
        elif draw < 0.04 and plan.keeps_records:
            yield command | {"command_id": f"lookalike-{number}"}


def storm(broker: LocalBroker, broker_kills: int = 2) -> Scenario:
    """Cause one fault each second: kills, cuts and stops of workers, and kills of the broker."""

    def cause(scene: Scene) -> None:
        plan, fleet = scene.plan, scene.fleet
        kill_broker_at = {round(plan.seconds * (index + 1) / (broker_kills + 1)) for index in range(broker_kills)}
        stopped: list[WorkerProcess] = []
        for second in range(1, round(plan.seconds) + 1):
            scene.wait(1)
            number = scene.randomness.randrange(plan.workers)
            for worker in stopped:
                worker.process.signal(signal.SIGCONT)
            stopped.clear()
            if second in kill_broker_at:
                scene.note("broker kills")
                broker.kill()
                broker.start()
                continue
            draw = scene.randomness.random()
            if draw < 0.5:
                scene.note("worker kills")
                fleet.kill(number)
            elif draw < 0.9:
                scene.note("cuts")
                fleet.cut(number)
            else:
                scene.note("stops for a second")
                fleet.workers[number].process.signal(signal.SIGSTOP)
                stopped.append(fleet.workers[number])
        for worker in stopped:
            worker.process.signal(signal.SIGCONT)

    return cause


class _Publisher:
    """Publishes commands at a constant rate, on a connection of its own."""

    def __init__(self, deployment: Deployment, commands: Sequence[dict[str, Any]], seconds: float) -> None:
        self._upstream = Upstream(deployment.broker_url, deployment.topology)
        self._commands = commands
        self._interval_s = seconds / len(commands)
        self.doubled: set[str] = set()  # ids of commands that were published again because their confirm was lost

    def run(self, over: threading.Event) -> None:
        """Publish all commands."""
        began = time.monotonic()
        for number, command in enumerate(self._commands):
            over.wait(began + number * self._interval_s - time.monotonic())
            while not over.is_set() and not self._is_confirmed(command):
                self.doubled.add(command["command_id"])
                wait_until(partial(_reconnects, self._upstream), DRAIN_S, "the broker")
        self._upstream.disconnect()

    def _is_confirmed(self, command: dict[str, Any]) -> bool:
        try:
            self._upstream.publish(command)
        except (pika.exceptions.AMQPError, OSError):
            return False
        return True


_RESULT_OF = {2: "cancelled", 4: "expired", 5: "executed", 6: "failed"}  # by the platform's send_status
_CALLS_BELOW = 6  # for each command
_Replies = dict[str, set[tuple[str, str | None, str | None]]]
_Results = dict[str, set[tuple[str, str, str | None]]]  # by command id: uuid, result and confirm_status


@contextmanager
def _counted_reads() -> Iterator[list[int]]:
    """Count how often histories are read; yields the count."""
    history, reads = Platform.history, [0]

    def counted(platform: Platform, query: Mapping[str, str]) -> dict[str, object]:
        reads[0] += 1
        return history(platform, query)

    with patch.object(Platform, "history", counted):
        yield reads


class _Devices:
    """Devices that act at random: some execute commands, some refuse them, and some begin to only in the end."""

    def __init__(self, simulator: Simulator, randomness: random.Random, plan: Plan, reads: list[int]) -> None:
        self._simulator = simulator
        self._plan = plan
        behaviours = ("up", "up", "up:METHOD_NOT_ALLOWED", "down")
        self._behaviours = {str(865820030000000 + n): randomness.choice(behaviours) for n in range(plan.devices)}
        simulator.platform.replace_devices(self._behaviours)
        self._is_calm = False
        self._reads = reads

    def connect_all(self) -> None:
        """Connect every device after the faults; some of the waiting commands are cancelled before."""
        if not self._is_calm:
            self._is_calm = True
            self._simulator.platform.cancels_valid = True
            for imei in [imei for imei, text in self._behaviours.items() if text == "down"][::2]:
                self._simulator.platform.cancel_all(imei)
            awake = {imei: "up" if text == "down" else text for imei, text in self._behaviours.items()}
            self._simulator.platform.replace_devices(awake)

    def compare(self, report: Report, replies: _Replies, results: _Results) -> None:
        """Compare the results with the platform: one for each accepted command, and the right one."""
        accepted = {
            (command_id, uuid) for command_id, outcomes in replies.items() for status, uuid, _ in outcomes if uuid
        }
        kept = {cached.uuid: cached for cached in self._simulator.platform.commands}
        expected = {
            (command_id, uuid, _RESULT_OF[kept[uuid].send_status], kept[uuid].confirm_status)
            for command_id, uuid in accepted
        }
        told = {(command_id, *result) for command_id, each in results.items() for result in each}
        report.wrong_result += map(str, sorted(expected ^ told, key=str))
        reads = f"{len(told)} results, {self._reads[0]} reads of histories"
        report.notes.append(reads)
        if self._reads[0] >= _CALLS_BELOW * len(told):
            report.too_many_calls.append(reads)


def _collect(
    deployment: Deployment,
    commands: Sequence[dict[str, Any]],
    report: Report,
    is_quiet: Callable[[], bool],
    devices: _Devices | None,
) -> tuple[_Replies, _Results]:
    """Collect replies until the faults are over and every command has one, and each accepted one a result."""
    wanted = {command["command_id"] for command in commands}
    replies: _Replies = {}
    results: _Results = {}

    def is_complete() -> bool:
        accepted = {uuid for outcomes in replies.values() for _, uuid, _ in outcomes if uuid}
        told = {uuid for each in results.values() for uuid, _, _ in each}
        return wanted <= replies.keys() and (devices is None or accepted <= told)

    latest: float | None = None
    quiet_since: float | None = None
    while True:
        try:
            while (message := deployment.upstream.try_reply()) is not None:
                if "result" in message.json:
                    told = message.json
                    result = told["uuid"], told["result"], told["confirm_status"]
                    results.setdefault(told["command_id"], set()).add(result)
                    continue
                # The last commands are those that rest in doubt: a gap among them is no stall.
                if latest is not None and len(replies) < _STEADY * len(wanted):
                    report.longest_gap_s = max(report.longest_gap_s, time.monotonic() - latest)
                latest = time.monotonic()
                reply = message.json
                code = reply["error"]["code"] if reply["error"] else None
                replies.setdefault(reply["command_id"], set()).add((reply["status"], reply["uuid"], code))
        except (pika.exceptions.AMQPError, OSError):
            wait_until(partial(_reconnects, deployment.upstream), DRAIN_S, "the broker")
        if is_quiet():
            quiet_since = quiet_since or time.monotonic()
            if devices is not None:
                devices.connect_all()
            if is_complete() or time.monotonic() - quiet_since > DRAIN_S:
                return replies, results
        time.sleep(_POLL_S)  # the broker is asked for replies, so that no reader holds one that is not read yet


def _left_over(deployment: Deployment, fleet: Fleet) -> list[str]:
    """Return which queues and workers still have commands although no reply is awaited any more."""
    topology = deployment.topology
    queues = [topology.execute_queue, *map(topology.retry_queue, topology.delay_queues_s)]
    if topology.result_delays_s:
        queues += [topology.results_queue, *map(topology.result_delay_queue, topology.result_delays_s)]
    found: list[str] = []

    def is_empty() -> bool:
        held = enumerate(fleet.unacknowledged())
        found[:] = [f"{queue} {count}" for queue in queues if (count := deployment.upstream.count(queue))]
        found.extend(f"worker {number}: {count} unacknowledged" for number, count in held if count != 0)
        return not found

    with suppress(TimeoutError):  # copies of commands that have a reply may still wait in the delay queues
        wait_until(is_empty, _SETTLE_S, "empty queues", every_s=1)
    return found


def _reconnects(upstream: Upstream) -> bool:
    try:
        upstream.connect()
    except (pika.exceptions.AMQPError, OSError):
        return False
    return True


def _compare(
    report: Report,
    commands: list[dict[str, Any]],
    replies: _Replies,
    deployment: Deployment,
    unrecognised: set[str],
) -> None:
    """Compare the replies with the platform; commands in ``unrecognised`` may be cached twice."""
    kept: dict[str, set[str]] = {}
    for cached in deployment.simulator.platform.commands:
        kept.setdefault(str(cached.args), set()).add(cached.uuid)
    ids_of: dict[str, set[str]] = {}
    for command in commands:
        ids_of.setdefault(command["args"], set()).add(command["command_id"])
    for args, ids in ids_of.items():
        uuids: list[str] = []
        for command_id in ids:
            outcomes = replies.get(command_id, set())
            if not outcomes:
                report.lost.append(command_id)
                continue
            if len(outcomes) > 1 and command_id not in unrecognised:
                report.contradictory.append(f"{command_id} {sorted(outcomes, key=str)}")
            status, uuid, code = next(iter(outcomes))
            report.outcomes[f"{status} {code or ''}".strip()] += 1
            if status == "accepted":
                uuids.append(str(uuid))
        found = kept.get(args, set())
        if len(uuids) != len(set(uuids)) or not set(uuids) <= found:
            report.wrong_uuid.append(f"{args} {uuids} {found}")
        if ids <= unrecognised:
            continue
        if len(found) > len(ids):
            report.cached_twice.append(f"{args} {found}")
        elif len(found) > len(uuids) and ids <= replies.keys():
            report.cached_but_failed.append(f"{args} {[replies[command_id] for command_id in ids]}")
