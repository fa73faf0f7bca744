"""Plots of a run of bench.lb; left out, and said so, where matplotlib is not installed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw(scenarios: Sequence[Mapping[str, Any]], heading: str, out: Path) -> None:
    """One picture: a row for each scenario, in it each measure with its medians and their range."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed: no plots", file=sys.stderr)
        return
    columns = max(len(one["measures"]) for one in scenarios)
    figure, grid = pyplot.subplots(
        len(scenarios), columns, figsize=(5.5 * columns, 1.8 * len(scenarios) + 1), squeeze=False
    )
    for axes_of_row, scenario in zip(grid, scenarios, strict=True):
        for axes in axes_of_row[len(scenario["measures"]) :]:
            axes.axis("off")
        for axes, (measure, found) in zip(axes_of_row, scenario["measures"].items(), strict=False):
            goal = f" (to reach: {found['goal']})" if found["goal"] else ""
            _bars(axes, found["balancers"], f"{scenario['scenario']}: {measure}{goal}")
    figure.suptitle(heading, fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "lb.png", dpi=100)
    pyplot.close(figure)


def _bars(axes: Any, balancers: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Medians, with the range of all rounds."""
    names, found = list(balancers), list(balancers.values())
    values = [one["median"] for one in found]
    spread = [
        [one["median"] - min(one["rounds"]) for one in found],
        [max(one["rounds"]) - one["median"] for one in found],
    ]
    colours = ["#2a7" if name == "handoff" else "#888" for name in names]
    bars = axes.barh(range(len(names)), values, xerr=spread, color=colours, ecolor="#555", capsize=2)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9)
    axes.bar_label(bars, fmt=lambda value: f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}", padding=3)
    axes.margins(x=0.25)
