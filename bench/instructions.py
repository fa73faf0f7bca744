"""Instructions for each request, in user space: the one figure that a noisy machine cannot spoil.

`python -m bench.instructions` needs valgrind. Each server runs under callgrind, with one worker, and answers a few and
then many requests of one kept-alive client; the difference, for each request, is what the path of a request costs.
What the kernel does comes on top, and is the same for all: the same system calls, of the same event loop.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import click

from bench import machine
from bench.servers import Handoff, Server, Uvicorn, end_on_term

FEW, MANY = 100, 2100
_STOP_SECONDS = 120.0
_REQUEST = b"GET / HTTP/1.1\r\nHost: bench\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n"


def _wrapper(directory: Path) -> str:
    """An interpreter that counts. (An exit status of a crash would say nothing: callgrind passes it on.)"""
    path = directory / "python"
    options = f"--tool=callgrind --callgrind-out-file=/dev/null --log-file={directory}/count.%p"
    path.write_text(f'#!/bin/sh\nexec valgrind {options} {sys.executable} "$@"\n')
    path.chmod(0o755)
    return str(path)


class CountedHandoff(Handoff):
    up_seconds = 300.0

    def command(self) -> list[str]:
        return [*super().command(), "--python", _wrapper(self.directory), "--boot-timeout", "300s"]


class CountedWithMetrics(CountedHandoff):
    name = "handoff --metrics"
    options = ("--metrics", "127.0.0.1:0")


class CountedUvicorn(Uvicorn):
    up_seconds = 300.0

    def command(self) -> list[str]:
        return [_wrapper(self.directory), *super().command()[1:]]


def count(kind: type[Server], requests: int) -> int:
    """All instructions of a worker that has answered so many requests."""
    with kind(1) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(requests):
                client.sendall(_REQUEST)
                data = b""
                while not data.endswith(b"\n"):
                    chunk = client.recv(65536)
                    if not chunk:
                        raise RuntimeError(f"{server.name} closed the connection")
                    data += chunk
        return _end_and_read(server)


def _end_and_read(server: Server) -> int:
    """Ends the worker, and only it: the master would kill one that takes as long to end as callgrind does."""
    assert server.process is not None
    workers = [one.pid for one in server.children()]
    if workers:
        os.kill(server.process.pid, signal.SIGSTOP)
    for pid in workers or [server.process.pid]:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    while True:
        texts = [path.read_text() for path in server.directory.glob("count.*")]
        found = [
            int(count[1].replace(",", "")) for text in texts if (count := re.search(r"I\s+refs:\s+([\d,]+)", text))
        ]
        if found:
            return max(found)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{server.name}: callgrind counted nothing: {texts}")
        time.sleep(0.1)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/out"), show_default=True)
def main(out: Path) -> None:
    """Count instructions."""
    end_on_term()
    heading = f"{machine.describe()}; user-space instructions for one request, from {FEW} to {MANY} requests"
    click.echo(heading)
    found: dict[str, Any] = {"heading": heading}
    for kind in (CountedUvicorn, CountedHandoff, CountedWithMetrics):
        few, many = count(kind, FEW), count(kind, MANY)
        found[kind.name] = each = (many - few) / (MANY - FEW)
        click.echo(f"{kind.name:20} {each:8.0f}  × {found['uvicorn'] / each:.3f} of uvicorn's speed")
    out.mkdir(parents=True, exist_ok=True)
    (out / "instructions.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
