"""The measurements, one function each: from settings and counts to figures."""

import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pika

from bench.stage import PROPERTIES, Kind, Stage, command
from worker.amqp.topology import EXECUTE

Figures = Mapping[str, float]

SATURATED, SLOW, SHARE = 64, 32, 8  # commands at a time
SLOW_S = 0.05
BRISK_S = (0.002, 0.005, 0.01)  # platforms between those that answer at once and slow ones
COLD = 160  # the first commands of a worker that has just started


@dataclass(frozen=True)
class Sizes:
    """The number of commands of each measurement."""

    saturated: int = 20_000
    brisk: int = 10_000
    slow: int = 6_400
    latency: int = 3_200
    fleet: int = 1_600  # per worker
    memory: int = 200_000
    queued: int = 1_000_000


def throughput(stage: Stage, kind: Kind, commands: int, concurrency: int, count: int = 1, redis: str = "") -> Figures:
    """Measure workers that empty a queue, without its first tenth and, with several workers, its last tenth."""
    stage.fill(commands)
    before = stage.platform.answered
    end = commands if count == 1 else commands * 9 // 10
    settings = {"IDEMPOTENCY_URL": redis} if redis else {}
    with stage.workers(kind, concurrency, count, **settings) as workers:
        stage.wait_for(before + commands // 10, workers)
        began, used, done = time.monotonic(), [worker.usage() for worker in workers], stage.platform.answered
        stage.wait_for(before + end, workers)
        lasted_s, answered = time.monotonic() - began, stage.platform.answered - done
        cpu_s = sum(worker.usage().cpu_s for worker in workers) - sum(usage.cpu_s for usage in used)
        stage.wait_for_replies(commands)
    assert stage.platform.answered - before == commands  # none was sent twice
    return {"per_s": answered / lasted_s, "cpu_us": cpu_s / answered * 1e6}


def latency(stage: Stage, kind: Kind, commands: int, per_s: float, concurrency: int) -> Figures:
    """Publish at a steady rate to a worker that has just started.

    Returns:
        The time from command to reply in ms, minus the platform's latency: of the first commands, and without the first
        tenth.
    """
    stage.fill(0)
    published_at: dict[str, float] = {}
    replied_at: dict[str, float] = {}

    def publish() -> None:
        connection = pika.BlockingConnection(pika.URLParameters(f"{stage.amqp_url}?heartbeat=0"))
        channel = connection.channel()
        began = time.monotonic()
        for number in range(commands):
            # The load under which latency is measured: per_s commands a second, evenly spaced.
            time.sleep(max(0.0, began + number / per_s - time.monotonic()))
            command_id = f"latency-{began}-{number}"
            published_at[command_id] = time.monotonic()
            channel.basic_publish(stage.topology.commands_exchange, EXECUTE, command(number, command_id), PROPERTIES)
        connection.close()

    with stage.workers(kind, concurrency) as workers:
        stage.wait(lambda: stage.consumers() > 0, workers)
        publisher = threading.Thread(target=publish, daemon=True)
        publisher.start()
        for _, properties, _ in stage.channel.consume(stage.replies, auto_ack=True):
            assert properties is not None
            replied_at[str(properties.correlation_id)] = time.monotonic()
            if len(replied_at) == commands:
                break
        stage.channel.cancel()
        publisher.join()
    added_ms = [(replied_at[name] - at - SLOW_S) * 1000 for name, at in published_at.items()]
    warm_ms = added_ms[commands // 10 :]
    return {"p50_ms": statistics.median(warm_ms), "p99_ms": _p99(warm_ms), "cold_p99_ms": _p99(added_ms[:COLD])}


def _p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def start(stage: Stage) -> Figures:
    """Return the time from start to consumption, in seconds."""
    with stage.workers("worker", SATURATED) as workers:
        stage.wait(lambda: workers[0].has_logged("consumer_started"), workers)
        return {"s": time.monotonic() - workers[0].started_at}


def memory(stage: Stage, commands: int, queued: int) -> Figures:
    """Measure the memory of a worker with a much longer queue: after a quarter, at the end, and its peak."""
    stage.fill(queued)
    before = stage.platform.answered
    with stage.workers("worker", SATURATED) as workers:
        stage.wait_for(before + commands // 4, workers)
        quarter = workers[0].usage()
        stage.wait_for(before + commands, workers)
        end = workers[0].usage()
    stage.fill(0)
    return {"quarter_mib": quarter.mib, "end_mib": end.mib, "peak_mib": end.peak_mib}
