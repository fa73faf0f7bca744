"""A real balancer for a test, and backends that are processes of their own."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.system.harness import DEADLINE_SECONDS, Service, read_response, wait_until

SERVER = """
import asyncio, os, signal, sys

name, fd = sys.argv[1], int(sys.argv[2])
open_connections = set()

async def serve(reader, writer):
    open_connections.add(asyncio.current_task())
    try:
        while True:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
            path = head.split()[1].decode()
            if path.startswith("/sleep"):
                await asyncio.sleep(float(path.partition("=")[2]))
            status = b"503 Sick" if path == "/health" and os.path.exists(name + ".sick") else b"200 OK"
            body = name.encode() + b" " + path.encode()
            ends = b"connection: close" in head.lower()
            head = b"HTTP/1.1 " + status + b"\\r\\nContent-Length: %d\\r\\n" % len(body)
            writer.write(head + (b"Connection: close\\r\\n" if ends else b"") + b"\\r\\n" + body)
            await writer.drain()
            if ends:
                break
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    writer.close()
    open_connections.discard(asyncio.current_task())

async def main():
    import socket
    listener = socket.socket(fileno=fd)
    server = await asyncio.start_server(serve, sock=listener, backlog=1000)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print("ready", flush=True)
    await ended.wait()
    server.close()
    while open_connections:
        await asyncio.wait(open_connections)

asyncio.run(main())
"""


class HttpBackend:
    """An HTTP server that answers `NAME PATH`; `/health` fails while there is a file NAME.sick. Owns its process."""

    def __init__(self, directory: Path, name: str, port: int = 0, host: str = "127.0.0.1") -> None:
        self.directory, self.name = directory, name
        listener = socket.create_server((host, port), backlog=1000)
        self.port: int = listener.getsockname()[1]
        self.address = f"{host}:{self.port}"
        with listener:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER, name, str(listener.fileno())],
                cwd=directory,
                pass_fds=[listener.fileno()],
                stdout=subprocess.PIPE,
            )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def sick(self, is_sick: bool) -> None:
        path = self.directory / f"{self.name}.sick"
        path.touch() if is_sick else path.unlink()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """And wait for its end: with TERM, that of its connections."""
        self.process.send_signal(number)
        self.process.wait(DEADLINE_SECONDS)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextlib.contextmanager
def http_backends(directory: Path, *names: str) -> Iterator[dict[str, HttpBackend]]:
    """By name; whatever stands in the dictionary at the end is closed."""
    made: dict[str, HttpBackend] = {}
    try:
        for name in names:
            made[name] = HttpBackend(directory, name)
        yield made
    finally:
        for one in made.values():
            one.close()


class Balancer(Service):
    """`handoff lb run lb.toml` in a directory of its own."""

    def __init__(self, directory: Path, text: str, *arguments: str, name: str = "edge") -> None:
        super().__init__(directory, app=None, name=name, bind=None)
        self.file = directory / "lb.toml"
        self.write(text)
        self.arguments = ["lb", "run", "lb.toml", *self.arguments[1:], "--state", str(directory / "state"), *arguments]

    def write(self, text: str) -> None:
        self.file.write_text(text)

    def lb(self, *arguments: str, timeout: float = DEADLINE_SECONDS) -> subprocess.CompletedProcess[str]:
        """One of the balancer's commands."""
        return self.handoff("lb", *arguments, timeout=timeout)

    def done(self, *arguments: str) -> str:
        """One that must succeed; what it said."""
        found = self.lb(*arguments)
        assert found.returncode == 0, (found.returncode, found.stdout, found.stderr)
        return found.stdout

    def lb_status(self) -> dict[str, Any]:
        """From the admin API; quicker than the command. Waits for a controller that is only starting."""
        found: dict[str, Any] = {}
        wait_until(lambda: found.update(self._get_status()) or found, "the controller answers")
        return found

    def admin(self, path: str) -> tuple[int, bytes]:
        """A GET on the private socket; status 0 while nobody answers there."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(DEADLINE_SECONDS)
            try:
                connection.connect(str(self.run_dir / self.name / "admin.sock"))
                connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
                status, _, body = read_response(connection)
            except (OSError, EOFError):
                return 0, b""
        return status, body

    def _get_status(self) -> dict[str, Any]:
        status, body = self.admin("/v1/status")
        return json.loads(body) if status == 200 else {}

    def backends(self, service: str = "shop") -> dict[str, dict[str, Any]]:
        """By POOL/NAME."""
        pools = self.lb_status()["services"][service]["pools"]
        return {f"{pool}/{name}": one for pool, all_ in pools.items() for name, one in all_["backends"].items()}

    def controller_pid(self) -> int | None:
        """None while there is none."""
        found = [one for one in self.status()["companions"] if one["name"] == "controller"]
        return found[0].get("pid") if found else None

    def body(self, path: str = "/") -> str:
        """Of one request on a connection of its own."""
        status, _, body = self.get(path)
        assert status == 200, status
        return body.decode()


class Kept:
    """A client with one kept-alive connection."""

    def __init__(self, service: Service) -> None:
        self.connection = service.connect()

    def ask(self, path: str = "/") -> str:
        self.connection.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        status, _, body = read_response(self.connection)
        assert status == 200, status
        return body.decode()

    def close(self) -> None:
        self.connection.close()


def config(
    pools: dict[str, list[str]], *, service: str = "", check: str | None = None, listen: str = "127.0.0.1:0"
) -> str:
    """An lb.toml with the one service `shop`. `service`: more lines of its table."""
    lines = ["[[service]]", 'name = "shop"', f'listen = ["{listen}"]', service]
    for name, addresses in pools.items():
        lines += [f"[service.pool.{name}]", f"backends = [{', '.join(addresses)}]"]
    if check is not None:
        lines += ["[service.check]", check]
    return "\n".join(lines) + "\n"


def backend(one: HttpBackend, more: str = "") -> str:
    """As it is written in a pool."""
    return f'{{ name = "{one.name}", address = "{one.address}"{more} }}'


HTTP_CHECK = 'type = "http"\npath = "/health"\ninterval = "200ms"\ntimeout = "1s"\nrise = 1\nfall = 2'
