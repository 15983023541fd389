"""``make bench``: measures the comparison and this worker in turn, and reports the figures."""

import json
import os
import platform as system
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from bench import chart, measure, report
from bench.measure import BRISK_S, SATURATED, SHARE, SLOW, SLOW_S, Figures, Sizes
from bench.platform import platform
from bench.stage import Kind, Stage
from scripts import services
from worker.dev.services.broker import start_local_broker
from worker.dev.services.redis import start_local_redis

_KINDS: tuple[Kind, ...] = ("worker", "comparison")
_FLEETS = (1, 2, 4)
_HALF_LOAD_PER_S = SLOW / SLOW_S / 2
_QUICK = Sizes(saturated=500, brisk=500, slow=320, latency=160, fleet=80, memory=1_000, queued=2_000)


@dataclass(frozen=True)
class Stages:
    """The environments of the measurements, by the latency of their platform, and the servers behind them."""

    by_latency_s: Mapping[float, Stage]
    redis_url: str
    broker: str

    @property
    def fast(self) -> Stage:
        """The platform answers at once."""
        return self.by_latency_s[0.0]

    @property
    def slow(self) -> Stage:
        """The platform takes 50 ms."""
        return self.by_latency_s[SLOW_S]


class Bench:
    """Measures round by round, and collects the figures."""

    def __init__(self, stages: Stages, sizes: Sizes) -> None:
        self.rounds: defaultdict[str, list[float]] = defaultdict(list)
        self._stages = stages
        self._sizes = sizes

    def round(self) -> None:
        """Measure one round, the two workers in turn."""
        sizes, fast, slow = self._sizes, self._stages.fast, self._stages.slow
        found = measure.throughput(fast, "worker", sizes.saturated, SATURATED, redis=self._stages.redis_url)
        self._note("worker.redis", found)
        for kind in _KINDS:  # in the same round, so that the figures are comparable
            self._note(f"{kind}.saturated", measure.throughput(fast, kind, sizes.saturated, SATURATED))
        for latency_s in BRISK_S:
            for kind in _KINDS:
                found = measure.throughput(self._stages.by_latency_s[latency_s], kind, sizes.brisk, SATURATED)
                self._note(f"{kind}.{latency_s * 1000:.0f}-ms", found)
        for kind in _KINDS:
            self._note(f"{kind}.slow", measure.throughput(slow, kind, sizes.slow, SLOW))
        for kind in _KINDS:
            found = measure.latency(slow, kind, sizes.latency, _HALF_LOAD_PER_S, SLOW)
            self._note(f"{kind}.latency", found)
        for count in _FLEETS:
            found = measure.throughput(slow, "worker", count * sizes.fleet, SHARE, count)
            self._note(f"worker.fleet-{count}", found)
        self._note("worker.start", measure.start(fast))

    def once(self) -> None:
        """Measure what takes too long to be repeated in each round."""
        self._note("worker.memory", measure.memory(self._stages.fast, self._sizes.memory, self._sizes.queued))

    def _note(self, name: str, figures: Figures) -> None:
        for figure, value in figures.items():
            self.rounds[f"{name}.{figure}"].append(value)
        print(f"  {name:24}", *(f"{figure} {value:,.2f}" for figure, value in figures.items()), flush=True)


@contextmanager
def stages() -> Iterator[Stages]:
    """Start the servers."""
    services.provide("rabbitmq", "redis")
    with ExitStack() as stack:
        broker = start_local_broker(stack)
        redis = start_local_redis(stack)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        made = {}
        for latency_s in (0.0, *BRISK_S, SLOW_S):
            behind = stack.enter_context(platform(latency_s))
            namespace = f"bench-{latency_s * 1000:.0f}-ms"
            made[latency_s] = stack.enter_context(Stage(namespace, broker.url, behind, folder))
        yield Stages(made, redis.url, broker.origin)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds.")] = 5,
    quick: Annotated[
        bool, typer.Option(help="One short round to test the benchmark; its figures mean nothing.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for performance.json and performance.png.")] = Path("docs"),
) -> None:
    """Measure this worker and the comparison."""
    sizes = _QUICK if quick else Sizes()
    with stages() as found:
        bench = Bench(found, sizes)
        for number in range(1, 1 + (1 if quick else rounds)):
            print(f"round {number}:", flush=True)
            bench.round()
        bench.once()
    result = report.as_json(_machine(found.broker), bench.rounds)
    output.mkdir(parents=True, exist_ok=True)
    (output / "performance.json").write_text(json.dumps(result, indent=1) + "\n")
    chart.draw(result, output / "performance.png")
    console = Console(width=110)
    console.print(Markdown(report.figure_table(result)))
    console.print(Markdown(report.target_table(result)))


def _machine(broker: str) -> dict[str, object]:
    return {
        "processors": os.cpu_count(),
        "system": f"{system.system()} {system.machine()}",
        "python": system.python_version(),
        "broker": broker,
    }


if __name__ == "__main__":
    typer.run(main)
