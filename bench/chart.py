"""The chart of the figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

_COLOURS = {"worker": "#1f6f8b", "comparison": "#c8963e"}
_PANELS: tuple[tuple[str, str, Sequence[tuple[str, str]]], ...] = (
    (
        "commands a second",
        "{:,.0f}",
        (
            ("saturated", "saturated.per_s"),
            ("with Redis", "redis.per_s"),
            ("at 2 ms", "2-ms.per_s"),
            ("at 10 ms", "10-ms.per_s"),
            ("at 50 ms", "slow.per_s"),
        ),
    ),
    (
        "processor time for a command, µs",
        "{:.0f}",
        (("saturated", "saturated.cpu_us"), ("with Redis", "redis.cpu_us"), ("at 50 ms", "slow.cpu_us")),
    ),
    (
        "added latency at half load, ms",
        "{:.1f}",
        (("median", "latency.p50_ms"), ("p99", "latency.p99_ms"), ("cold, p99", "latency.cold_p99_ms")),
    ),
    (
        "workers at 50 ms, commands a second",
        "{:,.0f}",
        (("1", "fleet-1.per_s"), ("2", "fleet-2.per_s"), ("4", "fleet-4.per_s")),
    ),
)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the chart as a PNG."""
    mpl.use("Agg")
    medians = result["medians"]
    figure, axes = plt.subplots(1, len(_PANELS), figsize=(15, 3.8), layout="constrained")
    for axis, (title, form, bars) in zip(axes, _PANELS, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(bars)), [label for label, _ in bars])
        axis.spines[["top", "right"]].set_visible(False)
        for shift, (kind, colour) in zip((-0.2, 0.2), _COLOURS.items(), strict=True):
            for place, (_, name) in enumerate(bars):
                value = medians.get(f"{kind}.{name}")
                if value is not None:
                    drawn = axis.bar(place + shift, value, 0.38, color=colour)
                    axis.bar_label(drawn, fmt=form, fontsize=8)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in _COLOURS.values()]
    figure.legend(handles, ["this worker", "comparison"], loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)
