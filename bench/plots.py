"""Plots of a bench run; left out, and said so, where matplotlib is not installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.reload import Result


def draw(results: Sequence[Result], out: Path) -> None:
    """One picture for each scenario: failures, the longest gap, and p99 in reloads beside steady."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed: no plots", file=sys.stderr)
        return
    for scenario in dict.fromkeys(result.scenario for result in results):
        chosen = [result for result in results if result.scenario == scenario]
        figure, axes = pyplot.subplots(1, 3, figsize=(14, 0.5 * len(chosen) + 1.5), sharey=True)
        _bars(axes[0], chosen, [result.summary.failed for result in chosen], "failed exchanges")
        _bars(axes[1], chosen, [result.summary.longest_gap_ms for result in chosen], "longest gap (ms)")
        ratio = [
            result.summary.reload_ms.get("p99", 0.0) / max(result.summary.steady_ms.get("p99", 0.0), 0.001)
            for result in chosen
        ]
        _bars(axes[2], chosen, ratio, "p99 in reloads / steady")
        figure.suptitle(f"{scenario}, {chosen[0].clients} clients, {chosen[0].reloads} reloads")
        figure.tight_layout()
        figure.savefig(out / f"reload-{scenario}.png", dpi=110)
        pyplot.close(figure)


def _bars(axes: Any, results: Sequence[Result], values: Sequence[float], title: str) -> None:
    places = range(len(results))
    bars = axes.barh(
        places, values, color=["#2a7" if result.server.startswith("handoff") else "#888" for result in results]
    )
    axes.set_yticks(list(places), [result.server for result in results])
    axes.invert_yaxis()
    axes.set_title(title)
    axes.bar_label(bars, fmt="%.0f" if max(values, default=0) >= 10 else "%.1f", padding=2)
