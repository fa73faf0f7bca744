"""Workers come and go, by accident and by command, and nobody else notices."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.system.apps import workbench
from tests.system.harness import Clients, Service, read_response, wait_until

GARBAGE = [
    b"\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"{}\n",
    b'{"type": "explode"}\n',
    b'{"type": "scale", "workers": "many"}\n',
    b'{"type": "reload", "labels": "typo"}\n',
    b"\xff\xfe\x00\n",
    b"[" * 10_000 + b"\n",
    b"x" * 40_000,
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with the workbench application, version 1, as main.py."""
    found = tmp_path / "app"
    found.mkdir()
    (found / "main.py").write_text(workbench("1"))
    return found


def ask_on(connection: socket.socket, path: str) -> bytes:
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
    return read_response(connection)[2]


def connections_by_worker(service: Service, count: int) -> dict[int, socket.socket]:
    """One kept-alive connection to each of `count` workers, by pid."""
    found: dict[int, socket.socket] = {}

    def complete() -> bool:
        connection = service.connect()
        pid = int(ask_on(connection, "/pid"))
        if pid in found:
            connection.close()
        else:
            found[pid] = connection
        return len(found) == count

    wait_until(complete, f"a connection to each of {count} workers")
    return found


def accepting(service: Service) -> list[dict[str, Any]]:
    return [worker for worker in service.workers() if worker["state"] == "accepting"]


def wait_for_replacement(service: Service, *pids: int) -> list[dict[str, Any]]:
    """Until the workers with these pids are gone and every slot accepts again."""

    def replaced() -> bool:
        (one,) = service.status()["generations"]
        states = [worker["state"] for worker in one["workers"]]
        return states == ["accepting"] * one["workers_wanted"] and not {w["pid"] for w in one["workers"]} & set(pids)

    wait_until(replaced, "the workers are replaced")
    return service.workers()


def test_a_killed_worker_is_replaced_while_the_others_serve(directory: Path) -> None:
    with Service(directory, "-w", "2") as service:
        connections = connections_by_worker(service, 2)
        slots = {worker["pid"]: worker["slot"] for worker in service.workers()}
        victim, survivor = connections
        (directory / "main.py").write_text(workbench("2"))  # not yet released
        with Clients(lambda: ask_on(connections[survivor], "/pid"), 1) as clients:
            os.kill(victim, signal.SIGKILL)
            after = wait_for_replacement(service, victim)
            clients.more(5)
        clients.assert_none_failed()
        assert {worker["slot"] for worker in after} == {0, 1}
        assert {worker["pid"]: worker["slot"] for worker in after}[survivor] == slots[survivor]
        assert service.status()["live"] == 1
        service.stderr.wait_for("was killed by SIGKILL with 1 open connection; crash 1 in a row")
        for connection in connections.values():
            connection.close()


def test_a_crash_loop_opens_the_breaker_and_a_reload_with_a_fix_closes_it(directory: Path) -> None:
    with Service(directory) as service:
        (directory / "main.py").write_text("1 / 0\n")  # the pinned directory itself is broken: only a reload helps
        os.kill(service.workers()[0]["pid"], signal.SIGKILL)
        service.stderr.wait_for("slot 0 is in a crash loop; trying slowly from now on")
        wait_until(lambda: service.stderr.text.count("ZeroDivisionError") >= 7, "each crash shows its reason")
        assert service.status()["generations"][0]["crash_loop_slots"] == [0]
        assert "crash loop in slot 0" in service.handoff("status").stdout
        (directory / "main.py").write_text(workbench("2"))
        assert service.ask({"type": "reload"})["exit_code"] == 0
        service.wait_for_generations(2)
        assert service.get()[2] == b"2"
        assert service.status()["generations"][0]["crash_loop_slots"] == []


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM])
def test_a_signal_that_means_something_to_other_servers_is_logged_and_ends_nothing(
    directory: Path, number: signal.Signals
) -> None:
    with Service(directory) as service:
        service.signal(number)
        service.stderr.wait_for(f"means nothing here.*signal={number.name}")
        assert service.get()[2] == b"1"


def test_scaling_by_command_and_by_signal_loses_nothing(directory: Path) -> None:
    with Service(directory, "-w", "2") as service, Clients(service.get, 3) as clients:

        def wait_for(count: int) -> None:
            wait_until(lambda: len(service.workers()) == len(accepting(service)) == count, f"{count} workers")

        done = service.handoff("scale", "4")
        assert (done.returncode, done.stdout) == (0, "web: 4 workers accept\n")
        assert [worker["slot"] for worker in accepting(service)] == [0, 1, 2, 3]
        service.signal(signal.SIGTTOU)
        wait_for(3)
        service.signal(signal.SIGTTIN)
        wait_for(4)
        assert service.ask({"type": "scale", "workers": 1})["exit_code"] == 0
        wait_for(1)
        assert [worker["slot"] for worker in accepting(service)] == [0]
        assert service.handoff("scale", "0").returncode == 9
        clients.more(10)
    clients.assert_none_failed()


def test_a_worker_that_is_sent_term_is_replaced_and_loses_no_request(directory: Path) -> None:
    with Service(directory, "-w", "2") as service, Clients(service.get, 3) as clients:
        with service.connect() as connection:
            pid = int(ask_on(connection, "/pid"))
            connection.sendall(b"GET /until?go HTTP/1.1\r\nHost: test\r\n\r\n")
            wait_until((directory / "go.began").exists, "the request is in progress")
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: len(accepting(service)) == 2 and len(service.workers()) == 3, "a replacement accepts")
            (directory / "go").touch()
            status, headers, body = read_response(connection)
            assert (status, body) == (200, b"1")
            assert "connection" not in headers
            assert int(ask_on(connection, "/pid")) != pid, "the connection moved"
        wait_for_replacement(service, pid)
    clients.assert_none_failed()


def test_workers_outlive_a_killed_master_as_long_as_their_requests_and_a_new_one_starts(directory: Path) -> None:
    with Service(directory, "-w", "2") as service:
        workers = [psutil.Process(worker["pid"]) for worker in service.workers()]
        with service.connect() as connection:
            connection.sendall(b"GET /until?go HTTP/1.1\r\nHost: test\r\n\r\n")
            wait_until((directory / "go.began").exists, "the request is in progress")
            service.signal(signal.SIGKILL)
            service.wait()
            assert service.handoff("status").returncode == 5
            bind = f"127.0.0.1:{service.port}"
            wait_until(lambda: not any(is_listening(worker) for worker in workers), "the orphans let go of the port")
            with Service(directory, bind=bind) as successor:
                assert successor.get()[2] == b"1"
                assert successor.handoff("status").returncode == 0
                (directory / "go").touch()
                assert read_response(connection)[2] == b"1"
                _, alive = psutil.wait_procs(workers, 60)
                assert not alive


def is_listening(process: psutil.Process) -> bool:
    try:
        found = process.net_connections(kind="tcp")
    except psutil.NoSuchProcess:
        return False
    return any(connection.status == psutil.CONN_LISTEN for connection in found)


def test_garbage_on_the_control_socket_closes_that_peer_only(directory: Path) -> None:
    with Service(directory) as service, service.control_socket() as good:
        good.sendall(b'{"type": ')
        for garbage in GARBAGE:
            with service.control_socket() as bad:
                bad.sendall(garbage)
                assert received(bad) == b""
        with service.control_socket() as leaver:
            leaver.sendall(b'{"type": "status"')
        good.sendall(b'"status"}\n')
        assert json.loads(received(good))["live"] == 1
        lines = "closed a peer that sent garbage"
        wait_until(lambda: service.stderr.text.count(lines) == len(GARBAGE), "each is in the log")
        assert service.get()[2] == b"1"


def received(connection: socket.socket) -> bytes:
    data = b""
    try:
        while chunk := connection.recv(65536):
            data += chunk
    except ConnectionResetError:  # it closed without reading all that we sent
        return b""
    return data


def test_status_says_everything(directory: Path) -> None:
    with Service(directory, "-w", "2", "--label", "v1") as service, service.connect() as connection:
        pid = int(ask_on(connection, "/pid"))
        ask_on(connection, "/")
        wait_until(lambda: sum(one["requests"] for one in service.workers()) == 2, "the requests are counted")
        done = service.handoff("status", "--json")
        assert done.returncode == 0
        status = json.loads(done.stdout)
        assert (status["name"], status["pid"], status["live"]) == ("web", service.pid, 1)
        assert status["listeners"] == [{"name": "default", "address": f"127.0.0.1:{service.port}"}]
        assert abs(status["usage"]["open_fds"] - status["open_fds"]) <= 1, "one of them counts whoever asked"
        (generation,) = status["generations"]
        assert (generation["generation"], generation["label"], generation["state"]) == (1, "v1", "live")
        assert (generation["directory"], generation["app"]) == (str(directory.resolve()), "main:app")
        assert os.path.samefile(generation["python"], sys.executable)
        assert generation["workers_wanted"] == 2
        assert [worker["slot"] for worker in generation["workers"]] == [0, 1]
        (busy,) = [worker for worker in generation["workers"] if worker["pid"] == pid]
        assert (busy["connections"], busy["requests"], busy["interface"]) == (1, 2, "asgi")
        assert busy["usage"]["rss_bytes"] > busy["usage"]["pss_bytes"] > 1_000_000
        assert busy["usage"]["cpu_seconds"] >= 0
        assert busy["usage"]["open_fds"] > 3
        shown = service.handoff("status").stdout
        for text in ("web: generation 1 live", f"master pid {service.pid}", "generation 1 v1: live", str(pid)):
            assert text in shown
        listed = service.handoff("ps")  # asks all services of the run directory
        assert listed.returncode == 2, "ps takes no name"


def test_requests_in_progress_are_counted(directory: Path) -> None:
    with Service(directory) as service, service.connect() as connection:
        connection.sendall(b"GET /until?go HTTP/1.1\r\nHost: test\r\n\r\n")
        wait_until(lambda: service.workers()[0]["in_progress"] == 1, "the request is counted")
        (directory / "go").touch()
        read_response(connection)
        wait_until(lambda: service.workers()[0]["in_progress"] == 0, "its end is counted")


def test_counters_of_connections_go_back_to_zero(directory: Path) -> None:
    with Service(directory, "-w", "2") as service:
        connections = [service.connect() for _ in range(20)]

        def count() -> int:
            return sum(int(worker["connections"]) for worker in service.workers())

        wait_until(lambda: count() == 20, "all are counted")
        for connection in connections:
            connection.close()
        wait_until(lambda: count() == 0, "none is counted")


def test_a_stopped_worker_is_killed_after_the_deadlines_of_a_reload(directory: Path) -> None:
    with Service(directory, "-w", "2", "--drain-timeout", "300ms") as service:
        frozen = service.workers()[0]["pid"]
        os.kill(frozen, signal.SIGSTOP)
        (directory / "main.py").write_text(workbench("2"))
        assert service.ask({"type": "reload"})["exit_code"] == 0
        service.wait_for_generations(2)
        assert not psutil.pid_exists(frozen)
        assert service.get()[2] == b"2"
