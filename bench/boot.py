"""The longest gap in answers while an application that takes long to import is reloaded, and what a reload costs.

`python -m bench.boot`: for an import that sleeps and one that computes, the longest gap (beside the longest in steady
load, which is the machine's and not the reload's); for an empty application the time to the commit beyond its
probation, and the master's memory.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import click
import psutil

from bench import machine
from bench.reload import CLIENTS, measure
from bench.servers import SERVERS, Handoff, Restart, Server, end_on_term

PROBATION_SECONDS = 1.0
_VARIABLES = {"sleeps": "BOOT_SLEEP", "computes": "BOOT_SPIN"}


def _slow(kind: type[Server], how: str, seconds: float) -> type[Server]:
    class Slow(kind):  # type: ignore[misc, valid-type]
        name = f"{kind.name}, import {how} {seconds:g} s"

        def __init__(self, workers: int = 2) -> None:
            super().__init__(workers, {_VARIABLES[how]: str(seconds)})

    return Slow


@click.command()
@click.option("--reloads", default=5, show_default=True)
@click.option("--import-seconds", default=3.0, show_default=True)
@click.option("--only", default="handoff", show_default=True, help="Names of servers, separated by commas; or all.")
@click.option("--steady", default=2.0, show_default=True, help="Seconds of load before, between and after reloads.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/out"), show_default=True)
def main(reloads: int, import_seconds: float, only: str, steady: float, out: Path) -> None:
    """Measure gaps, commits and memory."""
    end_on_term()
    heading = f"{machine.describe()}; 2 workers, {CLIENTS['new']} clients, {reloads} reloads"
    click.echo(heading)
    names = {name.strip() for name in only.split(",")}
    kinds = [kind for kind in SERVERS if kind is not Restart and (only == "all" or kind.name in names)]
    if not kinds:
        raise click.UsageError(f"--only: {only} is not known; known are: {', '.join(one.name for one in SERVERS)}")
    kinds = [kind for kind in kinds if kind.is_installed()]
    found: dict[str, Any] = {
        "heading": heading,
        "gaps": [_gap(_slow(kind, how, import_seconds), reloads, steady) for kind in kinds for how in _VARIABLES],
    }
    if Handoff in kinds:
        found["handoff"] = _cost(reloads)
    out.mkdir(parents=True, exist_ok=True)
    (out / "boot.json").write_text(json.dumps(found, indent=1))


def _gap(kind: type[Server], reloads: int, steady: float) -> dict[str, Any]:
    result = measure(kind, "new", reloads, 2, steady)
    summary = result.summary
    click.echo(
        f"{kind.name}: {result.effective} of {reloads} reloads happened, {summary.failed} of {summary.total} failed, "
        f"longest gap {summary.longest_gap_ms:.1f} ms (steady: {summary.steady_gap_ms:.1f} ms; "
        f"without what the machine itself stood still: {summary.own_gap_ms:.1f} ms)"
    )
    return {
        "server": kind.name,
        "effective": result.effective,
        "failed": summary.failed,
        "total": summary.total,
        "longest_gap_ms": summary.longest_gap_ms,
        "steady_gap_ms": summary.steady_gap_ms,
        "own_gap_ms": summary.own_gap_ms,
    }


def _cost(reloads: int) -> dict[str, Any]:
    """Of an empty application without load, by what `handoff reload` says."""
    with Handoff(2) as server:
        times = []
        for _ in range(reloads):
            found = re.search(r"\(([\d.]+) s\)", server.ask("reload"))
            assert found is not None
            times.append(float(found.group(1)) - PROBATION_SECONDS)
        assert server.process is not None
        memory = psutil.Process(server.process.pid).memory_info().rss / 2**20
    click.echo(
        f"empty application: commit {statistics.median(times):.2f} s beyond its probation "
        f"(median; {min(times):.2f}–{max(times):.2f})"
    )
    click.echo(f"master: {memory:.1f} MiB RSS after {reloads} reloads")
    return {"commit_seconds": times, "master_rss_mib": memory}


if __name__ == "__main__":
    main()
