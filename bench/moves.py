"""Live connections in a reload: how fast idle ones move, and what wrk with kept-alive ones sees.

`python -m bench.moves` (needs wrk and ss): some thousand idle connections move in a reload: the time until all are
adopted, until the old workers are gone, how many still answer, the longest answer that a busy client saw beside its
longest in steady load, and the longest time that the loop of any worker stood still, from its start to its end. Then
reloads under wrk: its errors, and whether each connection is still the one that it opened.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import resource
import select
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from bench import machine
from bench.servers import Handoff, end_on_term

_REQUEST = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n"
_STEADY_SECONDS = 1.0
_PAUSE_SECONDS = 0.004
_STEADY_RUN_SECONDS = 5
_ROUNDS = 10
"""Of reloads under wrk: so many pairs of percentiles."""
_POLL_SECONDS = 0.01


class Watch:
    """Asks the master's status again and again, and remembers when."""

    def __init__(self, server: Handoff) -> None:
        self._path = str(server.directory / "bench" / "control.sock")

    def status(self) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self._path)
            connection.sendall(b'{"type":"status"}\n')
            data = b""
            while chunk := connection.recv(65536):
                data += chunk
        found: dict[str, Any] = json.loads(data)
        return found

    def first(self, condition: Any, seconds: float = 60.0) -> float:
        """The time at which the status meets the condition for the first time. To ask is a load."""
        deadline = time.monotonic() + seconds
        while not condition(self.status()):
            if time.monotonic() > deadline:
                raise RuntimeError("the reload does not come to its end")
            time.sleep(_POLL_SECONDS)
        return time.monotonic()


class Probe:
    """One kept-alive client that asks all the time: when, and how long each answer took. It is hardly a load."""

    def __init__(self, port: int) -> None:
        self._connection = socket.create_connection(("127.0.0.1", port))
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.taken: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            _exchange(self._connection)
            self.taken.append((began, time.monotonic() - began))
            self._stop.wait(_PAUSE_SECONDS)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._connection.close()

    def longest_ms(self, begin: float, end: float) -> float:
        """Of the answers that were waited for between the two times."""
        return 1000 * max((took for at, took in self.taken if at + took >= begin and at <= end), default=0.0)


def _exchange(connection: socket.socket) -> None:
    connection.sendall(_REQUEST)
    data = b""
    while b"\r\n\r\n" not in data or not data.endswith(b"\n"):
        chunk = connection.recv(65536)
        if not chunk:
            raise RuntimeError("a connection was closed")
        data += chunk
    if b" 200 OK" not in data or b"connection: close" in data.lower():
        raise RuntimeError(f"not what was asked for: {data!r}")


def idle(connections: int, loop: str, workers: int) -> dict[str, float]:
    """One reload with so many idle connections. Times in milliseconds."""

    class Server(Handoff):
        app = "bench.apps.ticking:app"
        options = ("--loop", loop, "--probation", "100ms")

    with Server(workers) as server:
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(connections)]
        for client in clients:
            _exchange(client)
        watch, probe = Watch(server), Probe(server.port)
        time.sleep(_STEADY_SECONDS)
        reloading = threading.Thread(target=server.ask, args=("reload",))
        began = time.monotonic()
        old = watch.status()
        before = old["moves"]["adopted"]
        reloading.start()
        _wait_for_end([worker["pid"] for worker in old["generations"][0]["workers"]])
        adopted = watch.first(lambda status: status["moves"]["adopted"] - before >= connections)
        watch.first(_is_alone)
        committed, gone = _logged(server, "generation=2", "to=live"), _logged(server, "generation=1", "to=gone")
        reloading.join()
        probe.stop()
        for client in clients:
            _exchange(client)
            client.close()
        server.ask("stop")
        stalls = [float(line.split()[1]) for line in (server.directory / "stalls").read_text().splitlines()]
    return {
        "adopted_ms": 1000 * (adopted - committed),
        "old_gone_ms": 1000 * (gone - committed),
        "longest_answer_ms": probe.longest_ms(committed - 0.05, gone),
        "steady_longest_answer_ms": probe.longest_ms(began - _STEADY_SECONDS, began),
        "longest_stall_ms": max(stalls),
    }


def _wait_for_end(pids: Sequence[int], seconds: float = 60.0) -> None:
    """Of these processes; waiting is no load."""
    deadline = time.monotonic() + seconds
    waiting = [os.pidfd_open(pid) for pid in pids]
    for fd in waiting:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        has_ended = poll.poll(1000 * max(0.0, deadline - time.monotonic()))
        os.close(fd)
        if not has_ended:
            raise RuntimeError("the reload does not come to its end")


def _logged(server: Handoff, *words: str) -> float:
    """When the master logged that, to the millisecond, on the monotonic clock."""
    lines = (server.directory / "log").read_text().splitlines()
    line = next(line for line in lines if all(word in line.split() for word in words))
    at = datetime.datetime.fromisoformat(line.split()[0]).timestamp()
    return at - (time.time() - time.monotonic())


def under_wrk(reloads: int, clients: int) -> dict[str, Any]:
    """Reloads under wrk with kept-alive connections: what it says, and the connections that are still the same.

    In rounds, each with a steady load just before: the machine's speed drifts.
    """
    with Handoff(2) as server:
        _wrk(server.port, clients, 1).communicate(timeout=60)  # warm up
        rounds = [_round(server, count, clients) for count in _parts(reloads)]
        moves = Watch(server).status()["moves"]
    return {
        "errors": [error for one in rounds for error in one["errors"]],
        "same": min(one["same"] for one in rounds),
        "opened": clients,
        "moves": moves,
        "rate": statistics.median(one["rate"] for one in rounds),
        "p99_ms": [one["p99_ms"] for one in rounds],
        "steady_p99_ms": [one["steady_p99_ms"] for one in rounds],
    }


def _parts(reloads: int) -> list[int]:
    return [len(range(first, reloads, _ROUNDS)) for first in range(min(_ROUNDS, reloads))]


def _round(server: Handoff, reloads: int, clients: int) -> dict[str, Any]:
    def reload() -> None:
        live = Watch(server).status()["live"]
        server.ask("reload")
        Watch(server).first(lambda status: status["live"] == live + 1 and _is_alone(status))

    return beside_steady(server.port, clients, _STEADY_RUN_SECONDS, reloads, reload)


def beside_steady(
    port: int, clients: int, steady_seconds: int, count: int, replace: Callable[[], object]
) -> dict[str, Any]:
    """wrk without and with so many replacements: errors, percentiles, and the connections that are still the same."""
    steady, _ = _wrk(port, clients, steady_seconds).communicate(timeout=60)
    wrk = _wrk(port, clients, 3600)
    try:
        time.sleep(_STEADY_SECONDS)
        before = _client_ports(port)
        for _ in range(count):
            replace()
        after = _client_ports(port)
    finally:
        wrk.send_signal(2)
        output, _ = wrk.communicate(timeout=60)
    return {
        "errors": [line.strip() for line in output.splitlines() if "Socket errors" in line or "Non-2xx" in line],
        "same": len(before & after),
        "opened": len(before),
        "rate": float(next(line.split()[1] for line in output.splitlines() if line.startswith("Requests/sec"))),
        "p99_ms": _p99_ms(output),
        "steady_p99_ms": _p99_ms(steady),
    }


def _wrk(port: int, clients: int, seconds: int) -> subprocess.Popen[str]:
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--latency", f"http://127.0.0.1:{port}/"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _p99_ms(output: str) -> float:
    found = re.search(r"99%\s+([\d.]+)(us|ms|s|m)\b", output)
    assert found is not None, output
    return float(found.group(1)) * {"us": 0.001, "ms": 1, "s": 1000, "m": 60_000}[found.group(2)]


def _is_alone(status: dict[str, Any]) -> bool:
    return len(status["generations"]) == 1


def _client_ports(port: int) -> set[str]:
    command = ["ss", "-Htn", "state", "established", f"dport = :{port}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[2] for line in found.splitlines()}


@click.command()
@click.option("--connections", default=5000, show_default=True, help="Idle ones.")
@click.option("--rounds", default=5, show_default=True, help="Reloads with idle connections, each on a new server.")
@click.option("--workers", default=2, show_default=True, help="With idle connections.")
@click.option("--loop", default="uvloop", show_default=True)
@click.option("--reloads", default=100, show_default=True, help="Under wrk.")
@click.option("--clients", default=64, show_default=True, help="Of wrk.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/out"), show_default=True)
def main(connections: int, rounds: int, workers: int, loop: str, reloads: int, clients: int, out: Path) -> None:
    """Measure moves."""
    end_on_term()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    heading = f"{machine.describe()}; {workers} workers, {loop}"
    click.echo(heading)
    found: dict[str, Any] = {"heading": heading, "connections": connections, "idle": [], "wrk": None}
    for _ in range(rounds):
        figures = idle(connections, loop, workers)
        found["idle"].append(figures)
        click.echo(
            f"{connections} idle connections, all answer: adopted after {figures['adopted_ms']:.0f} ms, "
            f"old workers gone {figures['old_gone_ms']:.0f} ms after the commit, longest answer meanwhile "
            f"{figures['longest_answer_ms']:.1f} ms (steady: {figures['steady_longest_answer_ms']:.1f} ms), "
            f"longest stall of a loop {figures['longest_stall_ms']:.1f} ms"
        )
    if reloads:
        found["wrk"] = seen = under_wrk(reloads, clients)
        errors = "; ".join(seen["errors"]) or "no errors"
        steady, slow = seen["steady_p99_ms"], seen["p99_ms"]
        ratios = [one / other for one, other in zip(slow, steady, strict=True)]
        click.echo(
            f"{reloads} reloads under wrk with {clients} connections: {errors}; {seen['same']} of {seen['opened']} "
            f"connections are the same; {seen['moves']['moved']} moves; {seen['rate']:.0f} requests/s; "
            f"p99 {statistics.median(slow):.1f} ms (steady: {statistics.median(steady):.1f} ms), "
            f"× {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "moves.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
