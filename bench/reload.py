"""Reloads under load, beside other servers: `python -m bench.reload --help`.

Each server runs each scenario under strict clients, is reloaded again and again, and what its clients saw is counted.
Before each reload a new version is put there, and a reload counts only if all workers came to serve it: one that was
silently given up loses nothing, too. The negative control (kill and restart) must show failures in each scenario,
else the whole run is void and the exit code is 1.
"""

from __future__ import annotations

import contextlib
import json
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from bench import machine
from bench.clients import Record
from bench.plots import draw
from bench.responses import Outcome
from bench.servers import SERVERS, Replaced, Restart, Server, end_on_term
from bench.stalls import StallMeter
from bench.statistics_of import Exchange, Summary, Window, summarise

CLIENTS = {"new": 16, "keepalive": 32, "slow": 16, "streams": 16, "idle": 200}
LOAD_SECONDS = 60.0
"""How long the clients may take to finish what they have begun."""
WARM_UP_SECONDS = 0.5


class Result(NamedTuple):
    """`reconnects`: connections beyond one for each client, after a failure or an announced close.

    `usable`: of the idle scenario, how many connections still answered at the end. `notes`: of reloads that failed.
    """

    server: str
    version: str
    scenario: str
    clients: int
    reloads: int
    effective: int
    old_left: int
    reload_seconds: list[float]
    connections_opened: int
    announced_closes: int
    reconnects: int | None
    usable: int | None
    notes: list[str]
    summary: Summary


@click.command()
@click.option("--reloads", default=5, show_default=True, help="Reloads in each run.")
@click.option("--only", default="", help="Names of servers, separated by commas; default: all that are installed.")
@click.option("--scenario", "scenarios", multiple=True, type=click.Choice(list(CLIENTS)), help="Repeatable.")
@click.option("--workers", default=2, show_default=True)
@click.option("--processes", default=1, show_default=True, help="Processes that the clients are spread over.")
@click.option("--steady", default=2.0, show_default=True, help="Seconds of load before, between and after reloads.")
@click.option("--quick", is_flag=True, help="One reload each and half a second of steady load: does all work?")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/out"), show_default=True)
def main(
    reloads: int,
    only: str,
    scenarios: tuple[str, ...],
    workers: int,
    processes: int,
    steady: float,
    quick: bool,
    out: Path,
) -> None:
    """Measure what a reload costs the clients."""
    end_on_term()
    if quick:
        reloads, steady = 1, 0.5
    kinds = _chosen(only)
    heading = (
        f"{machine.describe()}\n{workers} workers, {reloads} reloads, {steady:g} s of steady load in between, "
        f"clients in {processes} processes\n{'; '.join(dict.fromkeys(kind.version() for kind in kinds))}"
    )
    click.echo(heading)
    results = []
    for kind in kinds:
        for scenario in scenarios or tuple(CLIENTS):
            if scenario in ("keepalive", "idle") and not kind.has_keep_alive:
                click.echo(f"{kind.name}: keeps no connection alive; {scenario} is left out")
                continue
            results.append(measure(kind, scenario, reloads, workers, steady, processes))
            click.echo(_row(results[-1]))
            _write(results, heading, out)  # after each, so that an end half-way leaves what was measured
    draw(results, out)
    click.echo(f"\n{_overview(results)}\n\nwritten to {out}")
    sys.exit(_judge(results))


def _judge(results: Sequence[Result]) -> int:
    """The exit code: 1 if the negative control says that this run proves nothing."""
    for result in results:
        if result.effective < result.reloads:
            click.echo(
                f"{result.server}, {result.scenario}: {result.reloads - result.effective} of {result.reloads} reloads "
                f"did not happen; its other numbers say nothing: {'; '.join(result.notes)}",
                err=True,
            )
    control = [result for result in results if result.server == Restart.name and result.reloads]
    if not control:
        click.echo(f"without the negative control ({Restart.name}) a zero here is no proof", err=True)
    blind = [result.scenario for result in control if not result.summary.failed]
    if blind:
        click.echo(f"the negative control shows no failures ({', '.join(blind)}): this run proves nothing", err=True)
    return 1 if blind else 0


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


def measure(kind: type[Server], scenario: str, reloads: int, workers: int, steady: float, processes: int = 1) -> Result:
    """One server under one scenario, from start to stop."""
    with kind(workers) as server, StallMeter() as meter, _load(server.port, scenario, processes) as load:
        time.sleep(WARM_UP_SECONDS)
        warm_at = time.monotonic()
        time.sleep(steady)
        windows, replaced = [], []
        for _ in range(reloads):
            began = time.monotonic()
            replaced.append(server.deploy())
            windows.append(Window(began, time.monotonic()))
            time.sleep(steady)
        stopped_at = time.monotonic()
        stalls = meter.stop()
        exchanges, counted = _collect(load)
    is_idle = scenario == "idle"
    # What fails while warming up counts as well; only its times do not.
    kept = [one for one in exchanges if is_idle or one.at >= warm_at or one.outcome is not Outcome.OK]
    return Result(
        server=kind.name,
        version=kind.version(),
        scenario=scenario,
        clients=CLIENTS[scenario],
        reloads=reloads,
        effective=sum(one.new >= workers and not one.note for one in replaced),
        old_left=max((one.old for one in replaced), default=0),
        reload_seconds=[window.end - window.start for window in windows],
        connections_opened=counted["connections_opened"],
        announced_closes=counted["announced_closes"],
        reconnects=counted["connections_opened"] - CLIENTS[scenario] if scenario == "keepalive" else None,
        usable=sum(one.outcome is Outcome.OK and one.at >= stopped_at for one in exchanges) if is_idle else None,
        notes=[_note(one) for one in replaced if one.note or one.new < workers],
        summary=summarise(kept, windows, stalls),
    )


def _note(replaced: Replaced) -> str:
    return replaced.note or f"{replaced.new} new workers and {replaced.old} old ones"


@contextlib.contextmanager
def _load(port: int, scenario: str, processes: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(processes):
            clients = CLIENTS[scenario] // processes + (number < CLIENTS[scenario] % processes)
            command = [sys.executable, "-m", "bench.clients", str(port), scenario, str(clients)]
            started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0))
        for one in started:
            _wait_until_running(one)
        yield started
    finally:
        for one in started:
            one.kill()
            one.communicate()


def _wait_until_running(load: subprocess.Popen[bytes]) -> None:
    """Its interpreter alone may take longer to start than a server to reload. Raises RuntimeError."""
    assert load.stdout is not None
    is_there, _, _ = select.select([load.stdout], [], [], LOAD_SECONDS)
    if not is_there or load.stdout.readline() != b"running\n":
        raise RuntimeError(f"a load process did not come to run within {LOAD_SECONDS:g} s: {load.args!r}")


def _collect(load: Sequence[subprocess.Popen[bytes]]) -> tuple[list[Exchange], dict[str, int]]:
    """Stops all clients at once. Raises RuntimeError if one of the processes did not last until then."""
    for one in load:
        assert one.stdin is not None
        one.stdin.close()
        one.stdin = None
    exchanges: list[Exchange] = []
    counted = {"connections_opened": 0, "announced_closes": 0}
    for one in load:
        written, _ = one.communicate(timeout=LOAD_SECONDS)
        line, _, columns = written.partition(b"\n")
        if one.returncode or not line:
            raise RuntimeError(f"a load process ended with {one.returncode}")
        found: dict[str, Any] = json.loads(line)
        if found["is_at_limit"]:
            raise RuntimeError("the load came to its limit before the reloads were over; take fewer of them")
        exchanges += Record.read(columns, found["exchanges"])
        for name in counted:
            counted[name] += found[name]
    return exchanges, counted


def _write(results: Sequence[Result], heading: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    table = "\n".join([_HEAD, _RULE, *map(_row, results)])
    (out / "reload.md").write_text(f"{heading}\n\n{_overview(results)}\n\n{table}\n")
    rows = [{**result._asdict(), "summary": result.summary._asdict()} for result in results]
    for row in rows:
        row["summary"]["first_failures"] = [one._asdict() for one in row["summary"]["first_failures"]]
    (out / "reload.json").write_text(json.dumps({"heading": heading, "results": rows}, indent=1))


def _overview(results: Sequence[Result]) -> str:
    """A row for each server, a column for each scenario."""
    scenarios = list(dict.fromkeys(result.scenario for result in results))
    lines = ["| lost | " + " | ".join(f"{one} ({CLIENTS[one]})" for one in scenarios) + " |"]
    lines.append("|---" * (len(scenarios) + 1) + "|")
    for server in dict.fromkeys(result.server for result in results):
        found = {result.scenario: result for result in results if result.server == server}
        lines.append(f"| {server} | " + " | ".join(_cell(found.get(one)) for one in scenarios) + " |")
    return "\n".join(lines)


def _cell(result: Result | None) -> str:
    if result is None:
        return "–"
    if result.effective < result.reloads:
        return f"void: {result.effective} of {result.reloads} reloads happened"
    if result.usable is not None:
        return f"{result.usable} of {result.clients} still usable"
    lost = f"{result.summary.failed} of {result.summary.total:,}"
    return lost if result.reconnects is None else f"{lost}, {result.reconnects} reconnects"


_HEAD = (
    "| server | scenario | reloads done | exchanges | failed | how | reconnects | announced | old workers left "
    "| p50 / p99 / p99.9 / max steady (ms) | the same in reloads (ms) | longest gap: steady, all (ms) "
    "| reload (s, median) |"
)
_RULE = "|---" * 13 + "|"


def _row(result: Result) -> str:
    summary = result.summary
    how = ", ".join(f"{count} {name}" for name, count in summary.failures.items()) or "–"
    reconnects = "– | –" if result.reconnects is None else f"{result.reconnects} | {result.announced_closes}"
    middle = statistics.median(result.reload_seconds) if result.reload_seconds else 0.0
    return (
        f"| {result.server} | {result.scenario} ({result.clients}) | {result.effective} of {result.reloads} "
        f"| {summary.total} | {summary.failed} | {how} | {reconnects} | {result.old_left} "
        f"| {_milliseconds(summary.steady_ms)} | {_milliseconds(summary.reload_ms)} "
        f"| {summary.steady_gap_ms:.0f}, {summary.longest_gap_ms:.0f} | {middle:.2f} |"
    )


def _milliseconds(values: dict[str, float]) -> str:
    return " / ".join(f"{value:.1f}" for value in values.values()) or "–"


if __name__ == "__main__":
    main()
