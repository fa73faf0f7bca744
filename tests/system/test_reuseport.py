"""`--listen-mode reuseport`: spread evenly, and no new connection is lost whatever becomes of a worker."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.slow_link import SlowLink, enter
from tests.system.harness import DEADLINE_SECONDS, Clients, Service, read_response, wait_until

APP = """
import os

async def app(scope, receive, send):
    assert scope["type"] == "http"
    body = os.environ["HANDOFF_SLOT"].encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
"""
WORKERS = 3


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "main.py").write_text(APP)
    return tmp_path


def serve(directory: Path, bind: str, command: list[str] | None = None, workers: int = WORKERS) -> Service:
    options = ("--listen-mode", "reuseport", "--workers", str(workers), "--no-access-log")
    return Service(directory, *options, bind=bind, command=command)


def exchange(host: str, port: int) -> int:
    """One request on a new connection; the slot that answered."""
    with socket.create_connection((host, port), timeout=DEADLINE_SECONDS) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
        status, _, body = read_response(connection)
        assert status == 200
        assert connection.recv(1) == b""
        return int(body)


def accepting(service: Service) -> list[int]:
    """The pids of the workers that accept, if the service has its number of them."""
    workers = service.workers()
    states = [one["state"] for one in workers]
    return [one["pid"] for one in workers] if states == ["accepting"] * WORKERS else []


def disturb(service: Service, clients: Clients, times: int) -> None:
    """Reloads, scale-downs and ends of workers, each under load."""
    for number in range(times):
        assert service.ask({"type": "reload"})["exit_code"] == 0
        clients.more(20)
        assert service.ask({"type": "scale", "workers": 1})["exit_code"] == 0
        clients.more(20)
        assert service.ask({"type": "scale", "workers": WORKERS})["exit_code"] == 0
        wait_until(lambda: bool(accepting(service)), "all workers accept")
        pid = accepting(service)[number % WORKERS]
        os.kill(pid, signal.SIGTERM)
        clients.more(20)
        wait_until(lambda gone=pid: bool(found := accepting(service)) and gone not in found, "it is replaced")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_no_new_connection_is_lost_on_loopback(directory: Path, host: str) -> None:
    with serve(directory, f"[{host}]:0" if ":" in host else f"{host}:0") as service:
        with Clients(lambda: exchange(host, service.port), 4) as clients:
            disturb(service, clients, 1)
        clients.assert_none_failed()


@pytest.fixture(scope="module")
def link() -> Iterator[SlowLink]:
    with SlowLink(0.2) as made:
        yield made


def within(namespace: str, call: Callable[[], int]) -> Callable[[], int]:
    """The same, from a thread that is in the namespace."""
    entered = threading.local()

    def called() -> int:
        if not hasattr(entered, "done"):
            enter(namespace)
            entered.done = True
        return call()

    return called


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_no_handshake_that_is_under_way_is_lost_at_a_round_trip_of_400_ms(
    directory: Path, link: SlowLink, family: str
) -> None:
    host = getattr(link, family)["server"]
    command = ["ip", "netns", "exec", link.namespaces["server"], sys.executable, "-m", "handoff"]
    with serve(directory, f"[{host}]:0" if ":" in host else f"{host}:0", command) as service:
        call = within(link.namespaces["client"], lambda: exchange(host, service.port))
        with Clients(call, 24) as clients:
            disturb(service, clients, 1)
        clients.assert_none_failed()


def test_new_connections_are_spread_evenly(directory: Path) -> None:
    with serve(directory, "127.0.0.1:0", workers=2) as service:
        found = Counter(exchange("127.0.0.1", service.port) for _ in range(2000))
        assert all(abs(found[slot] - 1000) < 100 for slot in range(2)), found  # 4.5 standard deviations


def test_a_worker_that_hangs_is_steered_away_from_and_its_queue_is_served(directory: Path) -> None:
    with serve(directory, "127.0.0.1:0") as service:
        wait_until(lambda: bool(accepting(service)), "all workers accept")
        os.kill(accepting(service)[0], signal.SIGSTOP)
        try:
            # Some of these are queued for the one that hangs, until a sibling takes them.
            answered = Counter(exchange("127.0.0.1", service.port) for _ in range(30))
            assert answered[0] == 0
        finally:
            os.kill(accepting(service)[0], signal.SIGCONT)
        wait_until(lambda: exchange("127.0.0.1", service.port) == 0, "it gets connections again")


def test_what_a_killed_worker_had_in_its_queue_is_answered_by_a_sibling(directory: Path) -> None:
    with serve(directory, "127.0.0.1:0") as service:
        wait_until(lambda: bool(accepting(service)), "all workers accept")
        (directory / "main.py").write_text("raise ValueError('its replacement cannot start')")
        pid = accepting(service)[0]
        os.kill(pid, signal.SIGSTOP)
        connections = [socket.create_connection(("127.0.0.1", service.port), DEADLINE_SECONDS) for _ in range(30)]
        for connection in connections:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        os.kill(pid, signal.SIGKILL)
        answers = Counter(read_response(connection)[2] for connection in connections)
        assert b"0" not in answers
        assert sum(answers.values()) == 30
        for connection in connections:
            connection.close()


BLOCKING = "def main(worker): ..."
BY_ITSELF = "async def main(worker):\n    await worker.ready()"


@pytest.mark.parametrize("app", [BLOCKING, BY_ITSELF])
def test_a_program_that_accepts_by_itself_is_refused(tmp_path: Path, app: str) -> None:
    (tmp_path / "main.py").write_text(app)
    problem = "listen-mode reuseport: is for ASGI, for WSGI, and for programs on asyncio that accept with worker.serve"
    with Service(tmp_path, "--listen-mode", "reuseport", app="main:main").launch() as service:
        assert service.wait() == 1
        assert problem in service.stderr.finish()


PROGRAM = """
import asyncio

class Answer(asyncio.Protocol):
    slot = 0

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        head = b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: 1\\r\\n\\r\\n"
        self.transport.write(head + b"%d" % Answer.slot)
        self.transport.close()

async def main(worker):
    Answer.slot = worker.slot
    await worker.serve(Answer, ["default"])
"""


def test_a_program_on_asyncio_loses_no_new_connection(directory: Path) -> None:
    (directory / "main.py").write_text(PROGRAM)
    options = ("--listen-mode", "reuseport", "--workers", str(WORKERS), "--bind", "unserved=127.0.0.1:0")
    with Service(directory, *options, app="main:main") as service:
        with Clients(lambda: exchange("127.0.0.1", service.port), 4) as clients:
            disturb(service, clients, 1)
        clients.assert_none_failed()
        wait_until(lambda: bool(accepting(service)), "all workers accept")
        pid = accepting(service)[0]
        os.kill(pid, signal.SIGSTOP)
        try:
            answered = Counter(exchange("127.0.0.1", service.port) for _ in range(30))
        finally:
            os.kill(pid, signal.SIGCONT)
        assert answered[0] == 0


def test_a_port_that_another_has_is_refused_even_if_it_would_share(directory: Path) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with serve(directory, f"127.0.0.1:{port}").launch() as service:
            assert service.wait() == 1
            assert f"127.0.0.1:{port} is in use by" in service.stderr.finish()
