"""Live relays in a reload of the balancer: how fast idle ones move, and what those that never rest see.

`python -m bench.lb_moves` (needs wrk and a C compiler): some thousand idle connections move in a reload. Then reload
after reload under long-lived echo streams, a download and an upload, whose every byte is looked at. Then reloads under
wrk with kept-alive connections: its errors, whether each connection is still the one that it opened, and its p99 beside
that in steady load.
"""

from __future__ import annotations

import json
import resource
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from bench import machine
from bench.balancers import HandoffBalancer
from bench.moves import beside_steady
from bench.peer import Peer
from bench.servers import end_on_term
from tests.system.harness import Clients
from tests.system.streams import Download, Echo, StreamServer, Upload

_STEADY_SECONDS = 2.0
_RELOAD_SECONDS = 60.0


class Watched(HandoffBalancer):
    """A balancer whose master is asked by its socket: a command takes longer to start than a reload."""

    def ask(self, request: str) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_RELOAD_SECONDS)
            connection.connect(str(self.directory / "bench" / "control.sock"))
            connection.sendall(json.dumps({"type": request}).encode() + b"\n")
            data = b""
            while chunk := connection.recv(65536):
                data += chunk
        return json.loads(data.splitlines()[-1])  # type: ignore[no-any-return]

    def first(self, condition: Any) -> float:
        """The time at which the status meets the condition for the first time."""
        deadline = time.monotonic() + _RELOAD_SECONDS
        while not condition(self.ask("status")):
            if time.monotonic() > deadline:
                raise RuntimeError("the reload does not come to its end")
            time.sleep(0.005)
        return time.monotonic()

    def replace(self) -> float:
        """Milliseconds from the verdict until no old process is left."""
        answer = self.ask("reload")
        if answer.get("exit_code") != 0:
            raise RuntimeError(f"the reload: {answer}")
        committed = time.monotonic()
        return 1000 * (self.first(lambda status: len(status["generations"]) == 1) - committed)


def idle(backend: int, peer: Peer, connections: int) -> dict[str, float]:
    """Milliseconds after the commit, of one reload."""
    with Watched(backend) as server, peer.holding(server.port, connections, 120.0):
        live = server.ask("status")["live"]
        before = server.ask("status")["moves"]["adopted"]
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(str(server.directory / "bench" / "control.sock"))
            asking.sendall(b'{"type":"reload"}\n')
            committed = server.first(lambda status: status["live"] == live + 1)
            adopted = server.first(lambda status: status["moves"]["adopted"] - before >= connections)
            gone = server.first(lambda status: len(status["generations"]) == 1)
    return {"adopted_ms": 1000 * (adopted - committed), "old_gone_ms": 1000 * (gone - committed)}


def streams(echoes: int, replacements: int) -> dict[str, Any]:
    """Every byte of them is looked at; raises where one is not right."""
    with StreamServer() as backend, Watched(int(backend.address.rpartition(":")[2])) as server:
        address = ("127.0.0.1", server.port)
        made = [Echo(address) for _ in range(echoes)]
        clients = [Clients(one.ask, 1, pace_seconds=0.2) for one in made]
        download, upload = Download(address), Upload(address)
        for one in clients:
            one.__enter__()
        gone = [server.replace() for _ in range(replacements)]
        for one in clients:
            one.__exit__()
            one.assert_none_failed()
        return {
            "opened": backend.opened,
            "exchanges": sum(one.done for one in clients),
            "down_bytes": download.finish(),
            "up_bytes": upload.finish(),
            "old_gone_ms": gone,
        }


def under_wrk(backend: int, replacements: int, clients: int) -> dict[str, Any]:
    with Watched(backend) as server:
        return beside_steady(server.port, clients, 10, replacements, server.replace)


@click.command()
@click.option("--connections", default=5000, show_default=True, help="Idle ones.")
@click.option("--rounds", default=3, show_default=True, help="Reloads with idle connections, each on a new balancer.")
@click.option("--echoes", default=50, show_default=True, help="Long-lived streams.")
@click.option("--replacements", default=50, show_default=True, help="Reloads under streams, and under wrk.")
@click.option("--clients", default=64, show_default=True, help="Of wrk.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/out"), show_default=True)
def main(connections: int, rounds: int, echoes: int, replacements: int, clients: int, out: Path) -> None:
    """Measure moves of relays."""
    end_on_term()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    heading = f"{machine.describe()}; 1 relay worker"
    click.echo(heading)
    found: dict[str, Any] = {"heading": heading, "connections": connections, "idle": []}
    with tempfile.TemporaryDirectory() as directory:
        peer = Peer(Path(directory))
        with peer.serving() as backend:
            for _ in range(rounds):
                found["idle"].append(one := idle(backend, peer, connections))
                click.echo(
                    f"{connections} idle connections: adopted {one['adopted_ms']:.0f} ms after the commit, "
                    f"old relay workers gone after {one['old_gone_ms']:.0f} ms"
                )
            found["wrk"] = seen = under_wrk(backend, replacements, clients)
    click.echo(
        f"{replacements} reloads under wrk: {'; '.join(seen['errors']) or 'no errors'}; {seen['same']} of "
        f"{seen['opened']} connections are the same; p99 {seen['p99_ms']:.1f} ms (steady: {seen['steady_p99_ms']:.1f})"
    )
    found["streams"] = told = streams(echoes, replacements)
    gone = told["old_gone_ms"]
    click.echo(
        f"{replacements} reloads under {echoes} echo streams ({told['exchanges']} exchanges), a download "
        f"({told['down_bytes'] / 1e9:.1f} GB) and an upload ({told['up_bytes'] / 1e9:.1f} GB): every byte right, "
        f"{told['opened']} connections to the backend in all; old processes gone after "
        f"{statistics.median(gone):.0f} ms (median), {max(gone):.0f} ms at most"
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "lb_moves.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
