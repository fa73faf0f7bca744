"""Live connections move: through reloads, rollbacks, scaling and crashes no client loses its connection."""

from __future__ import annotations

import contextlib
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.apps import hello, workbench
from tests.system.harness import Clients, Service, read_response, wait_until

FLASK = """
import os
from flask import Flask, request
app = Flask(__name__)

@app.get("/pid")
def pid():
    return str(os.getpid())

@app.get("/")
def client():
    return f"{request.remote_addr} {request.environ['REMOTE_PORT']}"
"""


class Kept:
    """A client that never opens a second connection."""

    def __init__(self, service: Service) -> None:
        self.connection = service.connect()

    def ask(self, path: str = "/pid") -> bytes:
        self.connection.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        status, headers, body = read_response(self.connection)
        assert status == 200
        assert "connection" not in headers, "the connection is to end"
        return body

    def close(self) -> None:
        self.connection.close()


@contextlib.contextmanager
def kept(service: Service, count: int) -> Iterator[list[Kept]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contextlib.closing(Kept(service))) for _ in range(count)]


def pids(service: Service) -> set[bytes]:
    return {str(worker["pid"]).encode() for worker in service.workers()}


def moves(service: Service) -> dict[str, int]:
    found: dict[str, int] = service.status()["moves"]
    return found


def reload(service: Service, times: int = 1) -> None:
    for _ in range(times):
        done = service.ask({"type": "reload"})
        assert done["exit_code"] == 0, done


def settle(service: Service) -> None:
    """Until only the live generation is there, and nothing waits."""
    service.wait_for_generations(service.status()["live"])
    wait_until(lambda: moves(service)["moved"] == moves(service)["adopted"], "what moved has arrived")


@pytest.mark.parametrize(("loop", "text"), [("uvloop", hello("1")), ("asyncio", hello("1")), ("uvloop", FLASK)])
def test_idle_and_busy_connections_stay_open_through_reloads(directory: Path, loop: str, text: str) -> None:
    (directory / "main.py").write_text(text)
    with Service(directory, "-w", "2", "--loop", loop) as service, kept(service, 10) as idle, kept(service, 1) as busy:
        for client in idle:
            client.ask()
        with Clients(busy[0].ask, 1, 0.0) as clients:
            for _ in range(3):
                reload(service)
                clients.more(3)
            settle(service)
            for client in idle:
                assert client.ask() in pids(service)
        assert moves(service)["moved"] >= 30
        assert moves(service)["refused"] == 0
    clients.assert_none_failed()


def test_the_clients_address_is_the_same_after_moves(directory: Path) -> None:
    (directory / "main.py").write_text(FLASK)
    with Service(directory) as service, kept(service, 1) as (client,):
        host, port = client.connection.getsockname()
        assert client.ask("/") == f"{host} {port}".encode()
        reload(service, 3)
        assert client.ask("/") == f"{host} {port}".encode()


def test_connections_move_back_with_a_rollback(directory: Path) -> None:
    with Service(directory) as service, kept(service, 5) as clients:
        (directory / "main.py").write_text(hello("2"))
        reload(service)
        settle(service)
        assert {client.ask("/") for client in clients} == {b"2"}
        (directory / "main.py").write_text(hello("1"))
        assert service.ask({"type": "rollback"})["exit_code"] == 0
        settle(service)
        assert {client.ask("/") for client in clients} == {b"1"}


def test_connections_that_a_generation_got_before_it_was_rolled_back_move_back(directory: Path) -> None:
    """One of its workers accepts already, the other never does: that generation is not committed."""
    with Service(directory, "-w", "2", probation="2s") as service, contextlib.ExitStack() as stack:
        (directory / "main.py").write_text(hello("2"))
        reloading = service.begin({"type": "reload"})
        wait_until(lambda: [one["state"] for one in service.workers(2)] == ["ready"] * 2, "they are on probation")
        stopped = service.workers(2)[1]["pid"]
        os.kill(stopped, signal.SIGSTOP)
        wait_until(lambda: service.workers(2)[0]["state"] == "accepting", "the other one accepts")
        got: list[Kept] = []

        def has_some_of_the_new() -> bool:
            client = stack.enter_context(contextlib.closing(Kept(service)))
            if client.ask("/") == b"2":
                got.append(client)
            return len(got) == 3

        wait_until(has_some_of_the_new, "the new one has connections")
        os.kill(stopped, signal.SIGKILL)
        answer = reloading.answer()
        assert (answer["exit_code"], answer["generation"]) == (3, 2)
        settle(service)
        assert {client.ask("/") for client in got} == {b"1"}
        assert moves(service)["refused"] == 0


def test_connections_of_a_worker_that_is_scaled_away_move_to_its_siblings(directory: Path) -> None:
    with Service(directory, "-w", "3") as service, kept(service, 12) as clients:
        assert {client.ask() for client in clients} <= pids(service)
        assert service.ask({"type": "scale", "workers": 1})["exit_code"] == 0
        settle(service)
        assert {client.ask() for client in clients} == pids(service)


def test_a_sibling_that_was_replaced_in_its_slot_takes_connections(directory: Path) -> None:
    with Service(directory, "--workers", "2") as service:
        first, second = service.workers()
        os.kill(second["pid"], signal.SIGKILL)

        def is_replaced() -> bool:
            found = service.workers()
            return [one["state"] for one in found] == ["accepting"] * 2 and found[1]["pid"] != second["pid"]

        wait_until(is_replaced, "the killed one is replaced")
        with kept(service, 10) as clients:
            os.kill(first["pid"], signal.SIGTERM)
            wait_until(lambda: first["pid"] not in [one["pid"] for one in service.workers()], "the first has gone")
            for client in clients:
                client.ask()
        assert moves(service)["refused"] == 0
        assert "KeyError" not in service.stderr.text


def test_connections_of_the_only_worker_wait_for_its_replacement_and_are_served_meanwhile(directory: Path) -> None:
    with Service(directory) as service, kept(service, 5) as clients:
        (old,) = pids(service)
        assert {client.ask() for client in clients} == {old}
        os.kill(int(old), signal.SIGTERM)
        wait_until(lambda: old not in pids(service), "it was replaced")
        assert {client.ask() for client in clients} == pids(service)


def test_a_surge_moves_connections_worker_by_worker(directory: Path) -> None:
    with Service(directory, "-w", "3", "--surge", "1") as service, kept(service, 9) as clients:
        for client in clients:
            client.ask()
        (directory / "main.py").write_text(hello("2"))
        reload(service)
        settle(service)
        assert {client.ask("/") for client in clients} == {b"2"}


def test_a_thousand_idle_connections_move(directory: Path) -> None:
    with Service(directory, "-w", "2") as service, kept(service, 1000) as clients:
        for client in clients:
            client.ask()
        reload(service)
        settle(service)
        for client in clients:
            assert client.ask() in pids(service)
        assert moves(service)["refused"] == 0


def test_tls_connections_finish_where_they_are(directory: Path) -> None:
    (directory / "main.py").write_text(workbench("1"))
    subject = ["-subj", "/CN=localhost", "-days", "1", "-nodes", "-keyout", "key.pem", "-out", "cert.pem"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", *subject]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)
    (directory / "handoff.toml").write_text('[uvicorn]\nssl_certfile = "cert.pem"\nssl_keyfile = "key.pem"\n')
    context = ssl.create_default_context(cafile=str(directory / "cert.pem"))
    with Service(directory) as service, service.connect() as plain:
        with context.wrap_socket(plain, server_hostname="localhost") as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            assert read_response(connection)[2] == b"1"
            connection.sendall(b"GET /until?go HTTP/1.1\r\nHost: test\r\n\r\n")
            wait_until((directory / "go.began").exists, "the request is in progress")
            (directory / "main.py").write_text(workbench("2"))
            reload(service)
            wait_until(lambda: [one["state"] for one in service.workers(1)] == ["draining"], "the old worker drains")
            (directory / "go").touch()
            status, headers, body = read_response(connection)
            while "connection" not in headers:  # the master says "draining" when it has told the worker to
                assert (status, body) == (200, b"1")
                connection.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
                status, headers, body = read_response(connection)
            assert (status, body, headers["connection"]) == (200, b"1", "close")
            assert connection.recv(1) == b""
        settle(service)


# --- balance --------------------------------------------------------------------------------------------------------


def connections(service: Service) -> list[int]:
    return [worker["connections"] for worker in service.workers()]


def is_even(service: Service, total: int) -> bool:
    """Nobody has more than a tenth above the even share, which is where workers begin to give; nothing is under way."""
    counts, of_all = connections(service), moves(service)
    return sum(counts) == total and max(counts) <= total / len(counts) * 1.1 and of_all["moved"] == of_all["adopted"]


@pytest.mark.parametrize("event", ["start", "scale", "crash"])
def test_workers_share_kept_connections_evenly(directory: Path, event: str) -> None:
    workers = {"start": 4, "scale": 1, "crash": 4}[event]
    with Service(directory, "-w", str(workers)) as service, kept(service, 40) as clients:
        for client in clients:
            client.ask()
        if event == "scale":
            assert service.ask({"type": "scale", "workers": 4})["exit_code"] == 0
        wait_until(lambda: len(connections(service)) == 4 and is_even(service, 40), "all have their share")
        if event == "crash":
            os.kill(service.workers()[0]["pid"], signal.SIGKILL)
            wait_until(
                lambda: len(connections(service)) == 4 and min(connections(service)) >= 6, "the new one has some"
            )
            return
        moved = moves(service)["moved"]
        for _ in range(5):
            for client in clients:
                client.ask()
        assert moves(service)["moved"] == moved, "what is even stays where it is"


# --- crashes, limits ------------------------------------------------------------------------------------------------


def test_connections_in_the_mailbox_of_a_killed_worker_are_served_by_others(directory: Path) -> None:
    (directory / "main.py").write_text(workbench("1"))
    with Service(directory, "-w", "2", "--max-generations", "5") as service, kept(service, 20) as clients:
        for client in clients:
            client.ask()
        stopped: list[int] = []

        def stop_one_of_the_new() -> bool:
            """As soon as it accepts it stops, before it can read what comes."""
            for worker in service.workers():
                if worker["state"] in ("ready", "opening") and not stopped:
                    os.kill(worker["pid"], signal.SIGSTOP)
                    stopped.append(worker["pid"])
            return bool(stopped)

        reloading = service.begin({"type": "reload"})
        wait_until(stop_one_of_the_new, "one of the new workers is stopped")
        os.kill(stopped[0], signal.SIGKILL)
        assert reloading.answer()["exit_code"] in (0, 3)
        settle(service)
        for client in clients:
            assert client.ask() in pids(service)


def test_letters_in_the_mailbox_of_a_reader_that_is_killed_reach_others(directory: Path) -> None:
    with Service(directory, "-w", "2") as service, kept(service, 30) as clients:
        for client in clients:
            client.ask()
        wait_until(lambda: is_even(service, 30), "both have their share")
        reader, giver = service.workers()
        given = [client for client in clients if client.ask() == str(giver["pid"]).encode()]
        os.kill(reader["pid"], signal.SIGSTOP)
        os.kill(giver["pid"], signal.SIGTERM)  # hands everything to the one that does not read
        wait_until(lambda: giver["pid"] not in {worker["pid"] for worker in service.workers()}, "the giver has gone")
        os.kill(reader["pid"], signal.SIGKILL)
        wait_until(lambda: reader["pid"] not in {worker["pid"] for worker in service.workers()}, "the reader has gone")
        settle(service)
        assert len(given) >= 12
        for client in given:
            assert client.ask() in pids(service)


def test_what_a_killed_sender_had_handed_over_lives_on(directory: Path) -> None:
    with Service(directory, "-w", "2") as service, kept(service, 1200) as clients:
        for client in clients:
            client.ask()
        wait_until(lambda: is_even(service, 1200), "both have their share")
        reader, giver = service.workers()
        given = [client for client in clients if client.ask() == str(giver["pid"]).encode()]
        before = moves(service)["moved"]
        os.kill(reader["pid"], signal.SIGSTOP)
        os.kill(giver["pid"], signal.SIGTERM)
        wait_until(lambda: moves(service)["waiting"] > 0, "the mailbox is full, and the giver waits for room")
        os.kill(giver["pid"], signal.SIGKILL)
        wait_until(lambda: giver["pid"] not in {worker["pid"] for worker in service.workers()}, "the giver has gone")
        moved = moves(service)["moved"] - before
        os.kill(reader["pid"], signal.SIGCONT)
        settle(service)
        assert 100 < moved < len(given)
        assert sum(is_open(client) for client in given) == moved
        for client in clients:
            assert client in given or is_open(client), "the others do not notice"


def is_open(client: Kept) -> bool:
    try:
        client.ask()
    except (OSError, EOFError):
        return False
    return True


def test_a_service_without_capabilities_and_with_few_fds_moves_all(directory: Path) -> None:
    """With RLIMIT_NOFILE 256 too many fds under way are refused (ETOOMANYREFS), and few can be received."""
    command = [sys.executable, "-m", "handoff"]
    # These two lift the cap of fds under way, which holds for every other user, and in containers for root, too.
    limited = ["setpriv", "--bounding-set", "-sys_resource,-sys_admin", "prlimit", "--nofile=256:256", *command]
    service = Service(directory, "-w", "2", command=limited)
    with service, kept(service, 180) as clients:
        service.command = command
        for client in clients:
            client.ask()
        for _ in range(3):
            reload(service)
            settle(service)
        for client in clients:
            assert client.ask() in pids(service)
        assert moves(service)["refused"] == 0
