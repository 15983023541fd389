"""The report of the benchmark."""

from collections.abc import Mapping

import pytest

from bench.report import Rounds, as_json, figure_table, target_table, targets

MEASURED: Mapping[str, list[float]] = {
    "worker.saturated.per_s": [1400, 4000, 9000],
    "comparison.saturated.per_s": [2000, 2000, 2000],
    "worker.saturated.cpu_us": [192, 192, 900],
    "comparison.saturated.cpu_us": [400, 400, 400],
    "worker.2-ms.per_s": [1100],
    "comparison.2-ms.per_s": [1000],
    "worker.5-ms.per_s": [1100],
    "comparison.5-ms.per_s": [1000],
    "worker.10-ms.per_s": [1100],
    "comparison.10-ms.per_s": [1000],
    "worker.slow.per_s": [608],
    "worker.slow.cpu_us": [210],
    "comparison.slow.cpu_us": [300],
    "worker.latency.p50_ms": [3],
    "comparison.latency.p50_ms": [2],
    "worker.latency.p99_ms": [8],
    "comparison.latency.p99_ms": [5],
    "worker.latency.cold_p99_ms": [11],
    "comparison.latency.cold_p99_ms": [6],
    "worker.redis.per_s": [980, 3000, 9000],
    "worker.memory.peak_mib": [64],
    "worker.memory.quarter_mib": [61],
    "worker.memory.end_mib": [64],
    "worker.start.s": [1.5],
    "worker.fleet-1.per_s": [100],
    "worker.fleet-2.per_s": [190],
    "worker.fleet-4.per_s": [380],
}


def test_a_figure_equal_to_its_limit_meets_the_target() -> None:
    assert all(target.is_met for target in targets(MEASURED))


@pytest.mark.parametrize(
    ("figure", "value"),
    [
        ("worker.saturated.per_s", 3990),
        ("worker.saturated.cpu_us", 193),
        ("worker.2-ms.per_s", 1099),
        ("worker.5-ms.per_s", 1099),
        ("worker.10-ms.per_s", 1099),
        ("worker.slow.per_s", 607),
        ("worker.slow.cpu_us", 211),
        ("worker.latency.p50_ms", 3.1),
        ("worker.latency.p99_ms", 8.1),
        ("worker.latency.cold_p99_ms", 11.1),
        ("worker.redis.per_s", 2999),
        ("worker.memory.peak_mib", 64.1),
        ("worker.memory.end_mib", 64.1),
        ("worker.start.s", 1.51),
        ("worker.fleet-2.per_s", 189),
        ("worker.fleet-4.per_s", 379),
    ],
)
def test_a_figure_beyond_its_limit_is_reported_as_not_met(figure: str, value: float) -> None:
    found: Rounds = {**MEASURED, figure: [value] * len(MEASURED[figure])}
    missed = [target for target in targets(found) if not target.is_met]
    assert len(missed) == 1
    table = target_table(as_json({}, found))
    assert table.count("**not met**") == 1
    assert f"| {missed[0].what} | {missed[0].wanted} | {missed[0].found} | **not met** |" in table


def test_ratios_are_computed_from_figures_of_the_same_round() -> None:
    """The machine may become faster between rounds, for both workers."""
    found: Rounds = {
        **MEASURED,
        "worker.saturated.per_s": [2000, 4000, 6000],
        "comparison.saturated.per_s": [1000, 2000, 8000],
    }
    met = {target.what: (target.found, target.is_met) for target in targets(found)}
    assert met["saturated throughput, 64 at a time"] == ("2.00 × (0.75 × to 2.00 ×)", True)


def test_the_figure_table_shows_medians_with_their_ranges() -> None:
    shown = figure_table(as_json({}, MEASURED))
    assert "| saturated, 64 at a time, commands a second | 4,000 (1,400 to 9,000) | 2,000 (2,000 to 2,000) |" in shown
