"""The longest gap in answers while an application that takes long to import is reloaded, and what a reload costs.

`python -m bench.boot`: for an import that sleeps and one that computes, for an empty application the time to the commit
beyond its probation, and the master's memory.
"""

from __future__ import annotations

import re
import statistics

import click
import psutil

from bench import machine
from bench.reload import CLIENTS, measure
from bench.servers import Handoff

PROBATION_SECONDS = 1.0


def _slow(variable: str, seconds: float) -> type[Handoff]:
    class Slow(Handoff):
        name = f"handoff, import {'sleeps' if variable == 'BOOT_SLEEP' else 'computes'} {seconds:g} s"

        def __init__(self, workers: int = 2) -> None:
            super().__init__(workers, {variable: str(seconds)})

    return Slow


@click.command()
@click.option("--reloads", default=5, show_default=True)
@click.option("--import-seconds", default=3.0, show_default=True)
def main(reloads: int, import_seconds: float) -> None:
    """Measure gaps, commits and memory."""
    click.echo(machine.describe())
    for variable in ("BOOT_SLEEP", "BOOT_SPIN"):
        kind = _slow(variable, import_seconds)
        result = measure(kind, "new", reloads, 2, 1.0)
        click.echo(
            f"{kind.name}: {result.summary.total} requests, {CLIENTS['new']} clients, {result.summary.failed} failed, "
            f"longest gap {result.summary.longest_gap_ms:.1f} ms over {reloads} reloads"
        )
    with Handoff(2) as server:
        times = []
        for _ in range(reloads):
            found = re.search(r"\(([\d.]+) s\)", server.ask("reload"))
            assert found is not None
            times.append(float(found.group(1)) - PROBATION_SECONDS)
        assert server.process is not None
        memory = psutil.Process(server.process.pid).memory_info().rss / 2**20
    median = statistics.median(times)
    click.echo(
        f"empty application: commit {median:.2f} s beyond its probation (median; {min(times):.2f}–{max(times):.2f})"
    )
    click.echo(f"master: {memory:.1f} MiB RSS after {reloads} reloads")


if __name__ == "__main__":
    main()
