"""Reloads under load, beside other servers: `python -m bench.reload --help`.

Each server runs each scenario under strict clients, is reloaded again and again, and what its clients saw is counted.
The negative control (kill and restart) must show failures, else the whole run is void and the exit code is 1.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import click

from bench import machine
from bench.plots import draw
from bench.responses import Outcome
from bench.servers import SERVERS, Restart, Server
from bench.statistics_of import Exchange, Summary, Window, summarise

CLIENTS = {"new": 16, "keepalive": 32, "slow": 16, "streams": 16, "idle": 200}
LOAD_SECONDS = 60.0
"""How long the clients may take to finish what they have begun."""


class Result(NamedTuple):
    server: str
    scenario: str
    reloads: int
    reload_seconds: list[float]
    connections_opened: int
    clients: int
    summary: Summary


@click.command()
@click.option("--reloads", default=5, show_default=True, help="Reloads in each run.")
@click.option("--only", default="", help="Names of servers, separated by commas; default: all that are installed.")
@click.option("--scenario", "scenarios", multiple=True, type=click.Choice(list(CLIENTS)), help="Repeatable.")
@click.option("--workers", default=2, show_default=True)
@click.option("--steady", default=2.0, show_default=True, help="Seconds of load before, between and after reloads.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/out"), show_default=True)
def main(reloads: int, only: str, scenarios: tuple[str, ...], workers: int, steady: float, out: Path) -> None:
    """Measure what a reload costs the clients."""
    click.echo(f"{machine.describe()}\n{workers} workers, {reloads} reloads, {steady:g} s of steady load in between")
    results = []
    for kind in _chosen(only):
        for scenario in scenarios or tuple(CLIENTS):
            result = measure(kind, scenario, reloads, workers, steady)
            results.append(result)
            click.echo(_row(result))
    out.mkdir(parents=True, exist_ok=True)
    table = "\n".join([_HEAD, _RULE, *map(_row, results)])
    (out / "reload.md").write_text(f"{machine.describe()}\n\n{table}\n")
    (out / "reload.json").write_text(json.dumps([result._asdict() for result in results], indent=1))
    draw(results, out)
    click.echo(f"\n{table}\n\nwritten to {out}")
    control = [result for result in results if result.server == Restart.name and result.scenario != "idle"]
    if control and not all(result.summary.failed for result in control):
        click.echo("the negative control shows no failures: this run proves nothing", err=True)
        sys.exit(1)


def _chosen(only: str) -> list[type[Server]]:
    wanted = {name.strip() for name in only.split(",") if name.strip()}
    unknown = wanted - {kind.name for kind in SERVERS}
    if unknown:
        known = ", ".join(kind.name for kind in SERVERS)
        raise click.UsageError(f"--only: {', '.join(unknown)} is not known; known are: {known}")
    kinds = [kind for kind in SERVERS if not wanted or kind.name in wanted]
    for kind in kinds:
        if not kind.is_installed():
            click.echo(f"{kind.name}: {kind.package} is not installed; left out", err=True)
    return [kind for kind in kinds if kind.is_installed()]


def measure(kind: type[Server], scenario: str, reloads: int, workers: int, steady: float) -> Result:
    """One server under one scenario, from start to stop."""
    clients = CLIENTS[scenario]
    with kind(workers) as server:
        load = subprocess.Popen(
            [sys.executable, "-m", "bench.clients", str(server.port), scenario, str(clients)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        windows = []
        try:
            time.sleep(steady)
            for _ in range(reloads):
                began = time.monotonic()
                server.reload()
                windows.append(Window(began, time.monotonic()))
                time.sleep(steady)
            written, _ = load.communicate("", timeout=LOAD_SECONDS)
        finally:
            load.kill()
            load.wait()
    found = json.loads(written)
    exchanges = [Exchange(at, seconds, Outcome(outcome)) for at, seconds, outcome in found["exchanges"]]
    summary = summarise(exchanges, windows)
    durations = [window.end - window.start for window in windows]
    return Result(kind.name, scenario, reloads, durations, found["connections_opened"], clients, summary)


_HEAD = (
    "| server | scenario | exchanges | failed | how | connections | p50 / p99 / p99.9 / max steady (ms) "
    "| the same in reloads (ms) | longest gap (ms) | reload (s, median) |"
)
_RULE = "|---" * 10 + "|"


def _row(result: Result) -> str:
    summary = result.summary
    how = ", ".join(f"{count} {name}" for name, count in summary.failures.items()) or "–"
    middle = sorted(result.reload_seconds)[len(result.reload_seconds) // 2] if result.reload_seconds else 0.0
    return (
        f"| {result.server} | {result.scenario} ({result.clients}) | {summary.total} | {summary.failed} | {how} "
        f"| {result.connections_opened} | {_milliseconds(summary.steady_ms)} | {_milliseconds(summary.reload_ms)} "
        f"| {summary.longest_gap_ms:.0f} | {middle:.2f} |"
    )


def _milliseconds(values: dict[str, float]) -> str:
    return " / ".join(f"{value:.1f}" for value in values.values()) or "–"


if __name__ == "__main__":
    main()
