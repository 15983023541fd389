"""The report of the benchmark."""

from collections.abc import Mapping

import pytest

from bench.report import Rounds, as_json, figure_table, target_table, targets

MEASURED: Mapping[str, list[float]] = {
    "worker.saturated.per_s": [1400, 3000, 9000],
    "comparison.saturated.per_s": [2000, 2000, 2000],
    "worker.saturated.cpu_us": [320, 320, 900],
    "comparison.saturated.cpu_us": [400, 400, 400],
    "worker.slow.per_s": [608],
    "worker.latency.p99_ms": [17],
    "comparison.latency.p50_ms": [2],
    "worker.redis.per_s": [980, 2100, 9000],
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
        ("worker.saturated.per_s", 2990),
        ("worker.saturated.cpu_us", 321),
        ("worker.slow.per_s", 607),
        ("worker.latency.p99_ms", 17.1),
        ("worker.redis.per_s", 2099),
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
        "worker.saturated.per_s": [1500, 3000, 6000],
        "comparison.saturated.per_s": [1000, 2000, 8000],
    }
    met = {target.what: (target.found, target.is_met) for target in targets(found)}
    assert met["saturated throughput, 64 at a time"] == ("1.50 × (0.75 × to 1.50 ×)", True)


def test_the_figure_table_shows_medians_with_their_ranges() -> None:
    shown = figure_table(as_json({}, MEASURED))
    assert "| saturated, 64 at a time, commands a second | 3,000 (1,400 to 9,000) | 2,000 (2,000 to 2,000) |" in shown
