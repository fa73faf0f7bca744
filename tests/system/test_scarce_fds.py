"""A worker that runs out of fds makes new clients wait; none of them is closed unanswered."""

from __future__ import annotations

import contextlib
import socket
import sys
from pathlib import Path

import pytest

from tests.system.harness import Service, read_response

LIMIT, CLIENTS = 160, 150

ECHO = """
import asyncio

class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(data)

async def main(worker):
    await worker.serve(Echo)
"""


def answered(connection: socket.socket, is_http: bool) -> bool:
    if is_http:
        return read_response(connection)[2] == b"1"
    return connection.recv(100) == b"hello"


@pytest.mark.parametrize(
    ("app", "loop", "backlog"),
    [
        ("main:app", "uvloop", 2048),
        ("main:app", "uvloop", 64),
        ("main:app", "asyncio", 64),
        ("echo:main", "uvloop", 64),
    ],
)
def test_clients_for_whom_there_is_no_fd_wait_and_are_answered(
    directory: Path, loop: str, app: str, backlog: int
) -> None:
    """uvloop with the smaller backlog accepts with care from some client on, the others from the start."""
    (directory / "echo.py").write_text(ECHO)
    is_http = app == "main:app"
    command = ["prlimit", f"--nofile={LIMIT}:{LIMIT}", sys.executable, "-m", "handoff"]
    options = ("--loop", loop, "--backlog", str(backlog))
    with Service(directory, *options, app=app, command=command) as service, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(service.connect()) for _ in range(CLIENTS)]
        for connection in connections:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n" if is_http else b"hello")
        service.stderr.wait_for("fds are scarce: new clients wait")
        for connection in connections:
            assert answered(connection, is_http)
            connection.close()
        with service.connect() as late:
            late.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n" if is_http else b"hello")
            assert answered(late, is_http)
        assert service.ask({"type": "reload"})["exit_code"] == 0
        service.wait_for_generations(2)
    assert "Traceback" not in service.stderr.text
