"""The balancer beside haproxy (TCP, one thread) and nginx stream (one worker), in one interleaved run.

`python -m bench.lb` needs wrk, haproxy, nginx with its stream module, and a C compiler. All balancers run side by side
before one server; each round every balancer gets the same load in turn, another one first each time. The machine's
speed drifts, so ratios to haproxy are taken round by round and their median counts. Load and server share the
processors with the balancer: compare CPU first.
"""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click

from bench import machine
from bench.balancers import BALANCERS, Balancer, HAProxy, SplicingHAProxy
from bench.lb_plots import draw
from bench.peer import Peer
from bench.servers import end_on_term
from bench.stalls import StallMeter
from bench.statistics_of import Window, without_stalls

BULK_BYTES = 512 * 1024 * 1024
LATENCY_RATE = 500
BURST_CONNECTIONS = 2000
SETTLE_SECONDS, AT_REST = 0.02, 0.05
"""At rest is who uses less than that share of a processor for so long."""
IDLE_CONNECTIONS = 5000
CALM = 0.05
"""A run in which the machine stood still for a greater share of the time is made again, if it may."""
IDLE_SECONDS = 120.0
"""How long they may be held at most."""

Found = dict[str, float]
"""What one run of one scenario found, by the names of the measures."""


class Bench(NamedTuple):
    peer: Peer
    backend: int
    seconds: int
    attempts: int


Run = Callable[[Bench, Balancer], Found]


class Scenario(NamedTuple):
    run: Run
    goals: Mapping[str, tuple[Literal["≥", "≤"], float]] = {}
    """Of the measure's ratio to haproxy's."""
    limits: Mapping[str, float] = {}
    """Of the measure itself."""
    splices: bool = False
    """haproxy is also run with its option for bulk data."""


class Round(NamedTuple):
    found: Found
    stalled: float
    """The share of the time in which the machine stood still."""


def _wrk(bench: Bench, balancer: Balancer, clients: int, *options: str) -> Found:
    noun = "connection" if options else "request"
    before = balancer.cpu_seconds()
    command = ["wrk", "-t1", f"-c{clients}", f"-d{bench.seconds}s", *options, f"http://127.0.0.1:{balancer.port}/"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=bench.seconds + 30).stdout
    if "Socket errors" in output or "Non-2xx" in output:
        raise RuntimeError(f"{balancer.name}: wrk saw errors, so its rate means nothing:\n{output}")
    requests, rate = _number(r"(\d+) requests in", output), _number(r"Requests/sec:\s+([\d.]+)", output)
    cpu = balancer.cpu_seconds() - before
    return {f"{noun}s/s": rate, f"CPU µs/{noun}": cpu / requests * 1e6}


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found.group(1))


def _keep_alive(bench: Bench, balancer: Balancer) -> Found:
    return _wrk(bench, balancer, 64)


def _connections(bench: Bench, balancer: Balancer) -> Found:
    return _wrk(bench, balancer, 32, "-H", "Connection: close")


def _bulk(direction: Literal["down", "up"], streams: int) -> Run:
    def run(bench: Bench, balancer: Balancer) -> Found:
        before = balancer.cpu_seconds()
        done = bench.peer.bulk(balancer.port, direction, streams, BULK_BYTES)
        cpu, gigabytes = balancer.cpu_seconds() - before, done["bytes"] / 1e9
        return {"GB/s": gigabytes / done["seconds"], "CPU s/GB": cpu / gigabytes}

    return run


def _latency(bench: Bench, balancer: Balancer) -> Found:
    before = balancer.cpu_seconds()
    done = bench.peer.latency(balancer.port, LATENCY_RATE, bench.seconds, 16)
    cpu = balancer.cpu_seconds() - before
    return {"p50 µs": done["p50_us"], "p99 µs": done["p99_us"], "CPU µs/request": cpu / done["count"] * 1e6}


def _burst(bench: Bench, balancer: Balancer) -> Found:
    before = balancer.cpu_seconds()
    done = bench.peer.burst(balancer.port, BURST_CONNECTIONS)
    _settle(balancer)
    cpu = balancer.cpu_seconds() - before
    return {"ms until all are answered": done["seconds"] * 1e3, "CPU µs/connection": cpu / done["count"] * 1e6}


def _settle(balancer: Balancer) -> None:
    """Until it is at rest: all these connections are closed at its own cost, and not in the next one's time."""
    before, now = 0.0, balancer.cpu_seconds()
    while now - before > AT_REST * SETTLE_SECONDS:
        time.sleep(SETTLE_SECONDS)
        before, now = now, balancer.cpu_seconds()


def _idle(bench: Bench, running: Balancer) -> Found:
    """In a process of its own: one that has had other loads keeps memory for the next."""
    with type(running)(bench.backend) as balancer:
        before = balancer.pss_bytes()
        with bench.peer.holding(balancer.port, IDLE_CONNECTIONS, IDLE_SECONDS):
            time.sleep(1.0)  # what was put off is done by then
            held = balancer.pss_bytes()
            began, cpu = time.monotonic(), balancer.cpu_seconds()
            time.sleep(bench.seconds)
            busy = (balancer.cpu_seconds() - cpu) / (time.monotonic() - began)
    return {
        "KB/connection": (held - before) / IDLE_CONNECTIONS / 1024,
        "MB before": before / 1e6,
        "CPU % when idle": busy * 100,
    }


_BULK_GOALS: dict[str, tuple[Literal["≥", "≤"], float]] = {"GB/s": ("≥", 1.4), "CPU s/GB": ("≤", 0.6)}
SCENARIOS: dict[str, Scenario] = {
    "keep-alive": Scenario(_keep_alive, {"requests/s": ("≥", 1.0), "CPU µs/request": ("≤", 1.05)}),
    "connections": Scenario(_connections, {"connections/s": ("≥", 0.95), "CPU µs/connection": ("≤", 1.15)}),
    "down, 1 stream": Scenario(_bulk("down", 1), _BULK_GOALS, splices=True),
    "down, 8 streams": Scenario(_bulk("down", 8), _BULK_GOALS, splices=True),
    "up, 1 stream": Scenario(_bulk("up", 1), _BULK_GOALS, splices=True),
    "up, 8 streams": Scenario(_bulk("up", 8), _BULK_GOALS, splices=True),
    "latency": Scenario(_latency, {"p99 µs": ("≤", 1.1)}),
    "burst": Scenario(_burst, {"ms until all are answered": ("≤", 1.0)}),
    "idle": Scenario(_idle, limits={"KB/connection": 2.0}),
}


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=4, show_default=True, help="Of each load that has a time.")
@click.option("--attempts", default=3, show_default=True, help="Runs of which the calmest counts, if none is calm.")
@click.option("--scenario", "scenarios", multiple=True, type=click.Choice(list(SCENARIOS)), help="Repeatable.")
@click.option("--only", default="", help="Names of balancers, separated by ;. Default: all that are installed.")
@click.option("--quick", is_flag=True, help="One round of one second: does all work?")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/out"), show_default=True)
def main(
    rounds: int, seconds: int, attempts: int, scenarios: tuple[str, ...], only: str, quick: bool, out: Path
) -> None:
    """Compare the balancers."""
    end_on_term()
    if quick:
        rounds, seconds, attempts = 1, 1, 1
    kinds = _chosen(only)
    heading = (
        f"{machine.describe()}\n{', '.join(dict.fromkeys(kind.version() for kind in kinds))}\n"
        f"{rounds} interleaved rounds, of each the calmest of up to {attempts} runs; "
        f"loads of {seconds} s, bulk of {BULK_BYTES // 2**20} MiB"
    )
    click.echo(heading)
    results = []
    with tempfile.TemporaryDirectory(prefix="handoff-bench-") as directory, contextlib.ExitStack() as stack:
        peer = Peer(Path(directory))
        bench = Bench(peer, stack.enter_context(peer.serving()), seconds, attempts)
        running = [stack.enter_context(kind(bench.backend)) for kind in kinds]
        for name in scenarios or SCENARIOS:
            scenario = SCENARIOS[name]
            taking = [one for one in running if scenario.splices or not isinstance(one, SplicingHAProxy)]
            found = _run(bench, scenario, taking, rounds)
            results.append(_report(name, scenario, found))
    out.mkdir(parents=True, exist_ok=True)
    (out / "lb.json").write_text(json.dumps({"heading": heading, "scenarios": results}, indent=1))
    draw(results, heading, out)


def _chosen(only: str) -> list[type[Balancer]]:
    kinds = []
    for kind in BALANCERS:
        if only and kind.name not in [name.strip() for name in only.split(";")]:
            continue
        if kind.is_installed():
            kinds.append(kind)
        else:
            click.echo(f"{kind.name} is not installed: left out", err=True)
    if not kinds:
        raise click.UsageError(f"no balancer is left; there are {'; '.join(kind.name for kind in BALANCERS)}")
    return kinds


def _run(bench: Bench, scenario: Scenario, taking: Sequence[Balancer], rounds: int) -> dict[str, list[Round]]:
    """Rounds by the balancers' names. Each round begins with another one."""
    found: dict[str, list[Round]] = {one.name: [] for one in taking}
    for number in range(rounds):
        first = number % len(taking)
        for one in (*taking[first:], *taking[:first]):
            tries: list[Round] = []
            while len(tries) < bench.attempts and not any(round_.stalled <= CALM for round_ in tries):
                tries.append(_measure(bench, scenario, one))
            found[one.name].append(min(tries, key=lambda round_: round_.stalled))
    return found


def _measure(bench: Bench, scenario: Scenario, balancer: Balancer) -> Round:
    with StallMeter() as meter:
        began = time.monotonic()
        found = scenario.run(bench, balancer)
        window = Window(began, time.monotonic())
        whole = window.end - window.start
        return Round(found, 1 - without_stalls(window, meter.stop()) / whole)


def _report(name: str, scenario: Scenario, found: Mapping[str, Sequence[Round]]) -> dict[str, Any]:
    """Prints and returns, for each measure, medians and bests, and ratios to haproxy, round by round and of the bests.

    What the machine stood still only ever adds to a cost: the best says more about the balancer, the median about luck.
    """
    reference = found.get(HAProxy.name, ())
    measures = {}
    for measure in next(iter(found.values()))[0].found:
        goal = _goal(scenario, measure)
        click.echo(f"\n{name}: {measure}{f' (to reach: {goal})' if goal else ''}")
        measures[measure] = {"goal": goal, "balancers": (rows := {})}
        for balancer, rounds in found.items():
            row = rows[balancer] = row_of(measure, rounds, reference)
            line = f"  {balancer:<22}{_shown(row['median']):>8}   best {_shown(row['best']):>7}"
            if balancer != HAProxy.name and "ratio" in row:
                line += f"   × {row['ratio']:.2f} ({min(row['ratios']):.2f}–{max(row['ratios']):.2f})"
                line += f", best × {row['best_ratio']:.2f}"
            click.echo(line)
    stalled = {balancer: statistics.median(one.stalled for one in rounds) for balancer, rounds in found.items()}
    click.echo("  the machine stood still: " + ", ".join(f"{one} {share:.0%}" for one, share in stalled.items()))
    sys.stdout.flush()
    return {"scenario": name, "measures": measures, "stalled": stalled}


def row_of(measure: str, rounds: Sequence[Round], reference: Sequence[Round]) -> dict[str, Any]:
    """Median, best and all values, and their ratios to the reference's where that has any."""
    values = [one.found[measure] for one in rounds]
    row: dict[str, Any] = {"median": statistics.median(values), "best": _best(measure, values), "rounds": values}
    ratios = ratios_of(measure, rounds, reference)
    if ratios:
        best = _best(measure, [one.found[measure] for one in reference])
        row |= {"ratio": statistics.median(ratios), "ratios": ratios}
        row["best_ratio"] = row["best"] / best if best else 0.0
    return row


def _best(measure: str, values: Sequence[float]) -> float:
    return max(values) if measure.endswith("/s") else min(values)


def ratios_of(measure: str, rounds: Sequence[Round], reference: Sequence[Round]) -> list[float]:
    """Of each round to the reference's of the same round, where that is not 0."""
    return [
        one.found[measure] / other.found[measure]
        for one, other in zip(rounds, reference, strict=False)
        if other.found[measure]
    ]


def _goal(scenario: Scenario, measure: str) -> str:
    if measure in scenario.limits:
        return f"≤ {scenario.limits[measure]:g}"
    if measure not in scenario.goals:
        return ""
    sign, limit = scenario.goals[measure]
    return f"{sign} {limit:g} × haproxy"


def _shown(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
