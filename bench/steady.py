"""Steady state, in pairs: `handoff run` beside the same uvicorn alone, and Flask beside gunicorn gthread.

`python -m bench.steady` needs wrk. Every round runs A, then B; the ratio is taken pair by pair, and its median counts,
because the machine's speed drifts. CPU seconds for each request are less noisy than rates.
"""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import click
import psutil

from bench import machine
from bench.servers import GunicornThreads, Handoff, HandoffWSGI, Server, Uvicorn, end_on_term


class FlaskOnHandoff(HandoffWSGI):
    name, app = "handoff, Flask", "bench.apps.flask_hello:app"


class FlaskOnGunicorn(GunicornThreads):
    name, app = "gunicorn gthread, Flask", "bench.apps.flask_hello:app"


class Round(NamedTuple):
    rate: float
    cpu_microseconds: float
    connections: tuple[int, ...]
    """Of each process that had some, most first, shortly before the end."""


@click.command()
@click.option("--rounds", default=7, show_default=True)
@click.option("--seconds", default=4, show_default=True, help="Of each run of wrk.")
@click.option("--workers", multiple=True, type=int, default=(1, 2), show_default=True, help="Repeatable.")
@click.option("--clients", default=32, show_default=True)
@click.option("--new-connections", is_flag=True, help="A new connection for each request.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/out"), show_default=True)
def main(rounds: int, seconds: int, workers: tuple[int, ...], clients: int, new_connections: bool, out: Path) -> None:
    """Compare rates and CPU in interleaved pairs."""
    end_on_term()
    heading = f"{machine.describe()}\nwrk -t1 -c{clients} -d{seconds}s, {rounds} rounds of A, B"
    click.echo(heading)
    pairs: list[tuple[type[Server], type[Server]]] = [(Handoff, Uvicorn), (FlaskOnHandoff, FlaskOnGunicorn)]
    results = []
    for count in workers:
        for first, second in pairs:
            with first(count) as one, second(count) as other:
                for server in (one, other):
                    _run(server, 1, clients, new_connections)  # warm up
                found = [
                    (_run(one, seconds, clients, new_connections), _run(other, seconds, clients, new_connections))
                    for _ in range(rounds)
                ]
            results.append(_report(count, first, second, found))
    out.mkdir(parents=True, exist_ok=True)
    (out / "steady.json").write_text(json.dumps({"heading": heading, "pairs": results}, indent=1))


def _run(server: Server, seconds: int, clients: int, new_connections: bool) -> Round:
    before = server.cpu_seconds()
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", f"http://127.0.0.1:{server.port}/"]
    if new_connections:
        command[1:1] = ["-H", "Connection: close"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(seconds * 0.8)
        connections = _connections(server)
        output, _ = running.communicate(timeout=seconds + 30)
    if "Socket errors" in output or "Non-2xx" in output:
        raise RuntimeError(f"{server.name}: wrk saw errors, so its rate means nothing:\n{output}")
    requests = int(_number(r"(\d+) requests in", output))
    cpu = server.cpu_seconds() - before
    return Round(_number(r"Requests/sec:\s+([\d.]+)", output), cpu / requests * 1e6, connections)


def _connections(server: Server) -> tuple[int, ...]:
    """Where the clients are: on few processors a server with an idle worker leaves its share of them to the load."""
    assert server.process is not None
    master = psutil.Process(server.process.pid)
    counts: list[int] = []
    for process in (master, *master.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            ours = [one for one in process.net_connections("tcp") if one.status == psutil.CONN_ESTABLISHED]
            counts.append(sum(one.laddr.port == server.port for one in ours))
    return tuple(sorted(filter(None, counts), reverse=True))


def _places(rounds: list[Round]) -> str:
    """How the clients were spread over the workers, round by round."""
    spread = ["+".join(map(str, one.connections)) for one in rounds]
    return "" if all(len(one.connections) < 2 for one in rounds) else f"   clients {' '.join(spread)}"


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found.group(1))


def _report(
    workers: int, first: type[Server], second: type[Server], found: list[tuple[Round, Round]]
) -> dict[str, Any]:
    click.echo(f"{workers} workers: {first.version()} beside {second.version()}")
    for kind, rounds in ((first, [one for one, _ in found]), (second, [other for _, other in found])):
        rate = statistics.median(one.rate for one in rounds)
        cpu = statistics.median(one.cpu_microseconds for one in rounds)
        click.echo(f"  {kind.name:<26} {rate:>9.0f} requests/s   {cpu:6.1f} µs CPU each (medians){_places(rounds)}")
    rates = [one.rate / other.rate for one, other in found]
    cpus = [one.cpu_microseconds / other.cpu_microseconds for one, other in found]
    click.echo(
        f"  {first.name} / {second.name}: rate × {statistics.median(rates):.3f} ({min(rates):.2f}–{max(rates):.2f}), "
        f"CPU × {statistics.median(cpus):.3f} ({min(cpus):.2f}–{max(cpus):.2f})"
    )
    return {
        "workers": workers,
        "first": first.name,
        "second": second.name,
        "rounds": [(one._asdict(), other._asdict()) for one, other in found],
        "rate_ratio_median": statistics.median(rates),
        "cpu_ratio_median": statistics.median(cpus),
    }


if __name__ == "__main__":
    main()
