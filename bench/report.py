"""Compares figures with targets, and renders both as tables. Pure."""

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Rounds = Mapping[str, Sequence[float]]
"""The values of each figure, one per round."""


@dataclass(frozen=True)
class Target:
    """One target with its measured value, and whether it is met."""

    what: str
    wanted: str
    found: str
    is_met: bool


def median(rounds: Rounds, name: str) -> float:
    """Return the median of a figure over all rounds."""
    return statistics.median(rounds[name])


@dataclass(frozen=True)
class _Goal:
    """A target without measurements: ``value`` computes one number from the figures in ``names``.

    It is computed for each round, since only figures of the same round are comparable, and the median is judged.
    """

    what: str
    wanted: str
    limit: float
    names: tuple[str, ...]
    value: Callable[..., float]
    form: str
    is_least: bool = False

    def compare(self, rounds: Rounds) -> Target:
        values = [self.value(*round_) for round_ in zip(*(rounds[name] for name in self.names), strict=True)]
        value = statistics.median(values)
        is_met = value >= self.limit if self.is_least else value <= self.limit
        return Target(self.what, f"{'≥' if self.is_least else '≤'} {self.wanted}", _cell(values, self.form), is_met)


def _ratio(one: float, other: float) -> float:
    return one / other


def _difference(one: float, other: float) -> float:
    return one - other


def _identity(one: float) -> float:
    return one


def _fleet(count: int) -> _Goal:
    what = f"{count} workers, platform at 50 ms, 8 at a time each"
    names = (f"worker.fleet-{count}.per_s", "worker.fleet-1.per_s")
    return _Goal(what, "0.95 × linear", 0.95, names, lambda all_, one: all_ / count / one, "{:.3f} ×", is_least=True)


def _brisk(latency_ms: int) -> _Goal:
    what = f"platform at {latency_ms} ms, 64 at a time"
    names = (f"worker.{latency_ms}-ms.per_s", f"comparison.{latency_ms}-ms.per_s")
    return _Goal(what, "1.1 × the comparison", 1.1, names, _ratio, "{:.2f} ×", is_least=True)


_GOALS = (
    _Goal(
        "saturated throughput, 64 at a time",
        "2.0 × the comparison",
        2.0,
        ("worker.saturated.per_s", "comparison.saturated.per_s"),
        _ratio,
        "{:.2f} ×",
        is_least=True,
    ),
    _Goal(
        "processor time for a command, saturated",
        "0.48 × the comparison",
        0.48,
        ("worker.saturated.cpu_us", "comparison.saturated.cpu_us"),
        _ratio,
        "{:.2f} ×",
    ),
    _brisk(2),
    _brisk(5),
    _brisk(10),
    _Goal(
        "platform at 50 ms, 32 at a time",
        "608/s, 95 % of what is possible",
        608,
        ("worker.slow.per_s",),
        _identity,
        "{:.0f}/s",
        is_least=True,
    ),
    _Goal(
        "processor time for a command, platform at 50 ms",
        "0.7 × the comparison",
        0.7,
        ("worker.slow.cpu_us", "comparison.slow.cpu_us"),
        _ratio,
        "{:.2f} ×",
    ),
    _Goal(
        "added latency at half load, median",
        "the comparison's + 1 ms",
        1,
        ("worker.latency.p50_ms", "comparison.latency.p50_ms"),
        _difference,
        "{:+.1f} ms",
    ),
    _Goal(
        "added latency at half load, p99",
        "the comparison's + 3 ms",
        3,
        ("worker.latency.p99_ms", "comparison.latency.p99_ms"),
        _difference,
        "{:+.1f} ms",
    ),
    _Goal(
        "added latency of the first 160 commands, p99",
        "the comparison's + 5 ms",
        5,
        ("worker.latency.cold_p99_ms", "comparison.latency.cold_p99_ms"),
        _difference,
        "{:+.1f} ms",
    ),
    _Goal(
        "throughput with Redis",
        "0.75 × with memory",
        0.75,
        ("worker.redis.per_s", "worker.saturated.per_s"),
        _ratio,
        "{:.2f} ×",
        is_least=True,
    ),
    _Goal("memory, 64 at a time, a million queued", "64 MiB", 64, ("worker.memory.peak_mib",), _identity, "{:.1f} MiB"),
    _Goal(
        "memory after 200,000 commands, beyond that after 50,000",
        "3 MiB",
        3,
        ("worker.memory.end_mib", "worker.memory.quarter_mib"),
        _difference,
        "{:+.1f} MiB",
    ),
    _Goal("start until it consumes", "1.5 s", 1.5, ("worker.start.s",), _identity, "{:.2f} s"),
    _fleet(2),
    _fleet(4),
)


def targets(rounds: Rounds) -> list[Target]:
    """Compare the figures with all targets."""
    return [goal.compare(rounds) for goal in _GOALS]


def as_json(machine: Mapping[str, Any], rounds: Rounds) -> dict[str, Any]:
    """Return machine, figures, medians and targets for performance.json."""
    return {
        "machine": machine,
        "rounds": rounds,
        "medians": {name: median(rounds, name) for name in rounds},
        "targets": [asdict(target) for target in targets(rounds)],
    }


def target_table(result: Mapping[str, Any]) -> str:
    """Return the targets as a table in Markdown."""
    rows = ["| | target | median of the rounds (lowest to highest) | |", "| --- | --- | --- | --- |"]
    for target in result["targets"]:
        met = "met" if target["is_met"] else "**not met**"
        rows.append(f"| {target['what']} | {target['wanted']} | {target['found']} | {met} |")
    return "\n".join(rows)


_SHOWN = (
    ("saturated, 64 at a time, commands a second", "saturated.per_s", "{:,.0f}"),
    ("saturated, processor time for a command, µs", "saturated.cpu_us", "{:.0f}"),
    ("the same with Redis, commands a second", "redis.per_s", "{:,.0f}"),
    ("the same with Redis, processor time for a command, µs", "redis.cpu_us", "{:.0f}"),
    ("platform at 2 ms, 64 at a time, commands a second", "2-ms.per_s", "{:,.0f}"),
    ("platform at 5 ms, 64 at a time, commands a second", "5-ms.per_s", "{:,.0f}"),
    ("platform at 10 ms, 64 at a time, commands a second", "10-ms.per_s", "{:,.0f}"),
    ("platform at 50 ms, 32 at a time, commands a second", "slow.per_s", "{:,.0f}"),
    ("platform at 50 ms, processor time for a command, µs", "slow.cpu_us", "{:.0f}"),
    ("added latency at 320 a second, median, ms", "latency.p50_ms", "{:.1f}"),
    ("added latency at 320 a second, p99, ms", "latency.p99_ms", "{:.1f}"),
    ("added latency of the first 160 commands, p99, ms", "latency.cold_p99_ms", "{:.1f}"),
    ("1 worker, platform at 50 ms, 8 at a time, commands a second", "fleet-1.per_s", "{:,.0f}"),
    ("2 workers", "fleet-2.per_s", "{:,.0f}"),
    ("4 workers", "fleet-4.per_s", "{:,.0f}"),
    ("start until it consumes, s", "start.s", "{:.2f}"),
    ("memory after a quarter of 200,000 commands, MiB", "memory.quarter_mib", "{:.1f}"),
    ("memory after all of them, MiB", "memory.end_mib", "{:.1f}"),
)


_ALL = frozenset(name for _, name, _ in _SHOWN)
# What the README shows: with a platform that is the limit, with one that is not, and what a user notices beside that.
SUMMARY = ("slow.per_s", "10-ms.per_s", "saturated.per_s", "latency.p99_ms", "start.s")


def figure_table(result: Mapping[str, Any], shown: Collection[str] = _ALL) -> str:
    """Return the medians and ranges of some figures, or of all, as a table in Markdown."""
    rows = ["| median (lowest to highest) | this worker | comparison |", "| --- | --- | --- |"]
    for what, name, form in _SHOWN:
        if name not in shown:
            continue
        cells = [_cell(result["rounds"].get(f"{kind}.{name}"), form) for kind in ("worker", "comparison")]
        if any(cells):
            rows.append(f"| {what} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def _cell(values: Sequence[float] | None, form: str) -> str:
    if not values:
        return ""
    middle, lowest, highest = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({lowest} to {highest})"
