"""`--listen-mode shared` beside `reuseport`: new connections per second, p99, and how evenly workers get them.

`python -m bench.listen_modes` needs wrk. Rounds alternate, since the machine's speed drifts; medians count.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import time
from typing import NamedTuple

import click

from bench import machine
from bench.servers import Handoff, end_on_term

_PUBLISHED_SECONDS = 1.2
"""Workers write their counts twice a second."""
_UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0}


class Shared(Handoff):
    name = "shared"


class Reuseport(Handoff):
    name = "reuseport"
    options = ("--listen-mode", "reuseport")


class Round(NamedTuple):
    rate: float
    p99_milliseconds: float
    unevenness: float
    """How far the worker that is furthest from the mean is from it, as a part of the mean."""


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=4, show_default=True, help="Of each run of wrk.")
@click.option("--workers", default=4, show_default=True)
@click.option("--clients", default=32, show_default=True)
def main(rounds: int, seconds: int, workers: int, clients: int) -> None:
    """Compare the two modes under new connections."""
    end_on_term()
    click.echo(machine.describe())
    click.echo(f"wrk -t1 -c{clients} -d{seconds}s, Connection: close, {workers} workers, {rounds} rounds of A, B")
    with Shared(workers) as shared, Reuseport(workers) as reuseport:
        found: dict[str, list[Round]] = {"shared": [], "reuseport": []}
        for server in (shared, reuseport):
            _run(server, 1, clients)  # warm up
        for _ in range(rounds):
            for server in (shared, reuseport):
                found[server.name].append(_run(server, seconds, clients))
    click.echo(f"{'':<10} {'connections/s':>14} {'p99 ms':>8} {'unevenness':>11}")
    for name, some in found.items():
        middle = [statistics.median(values) for values in zip(*some, strict=True)]
        click.echo(f"{name:<10} {middle[0]:>14.0f} {middle[1]:>8.1f} {middle[2]:>11.1%}")
    ratios = [b.rate / a.rate for a, b in zip(found["shared"], found["reuseport"], strict=True)]
    click.echo(
        f"reuseport / shared, pair by pair: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    )


def _run(server: Handoff, seconds: int, clients: int) -> Round:
    before = _requests(server)
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--latency", "-H", "Connection: close"]
    command.append(f"http://127.0.0.1:{server.port}/")
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 30).stdout
    if "Non-2xx" in output:
        raise RuntimeError(f"{server.name}: wrk saw errors, so its rate means nothing:\n{output}")
    time.sleep(_PUBLISHED_SECONDS)
    counts = [after - earlier for earlier, after in zip(before, _requests(server), strict=True)]
    mean = statistics.mean(counts)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
    p99 = re.search(r"99%\s+([\d.]+)(us|ms|s)", output)
    assert rate is not None, output
    assert p99 is not None, output
    unevenness = max(abs(count - mean) for count in counts) / mean
    return Round(float(rate[1]), float(p99[1]) * _UNITS[p99[2]], unevenness)


def _requests(server: Handoff) -> list[int]:
    """Of each worker, by slot."""
    answer = json.loads(server.ask("status", "--json"))
    (generation,) = answer["generations"]
    return [worker["requests"] for worker in generation["workers"]]


if __name__ == "__main__":
    main()
