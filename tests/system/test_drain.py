"""A drain takes nothing new and finishes what exists, under a deadline."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from pathlib import Path

import psutil
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.system.apps import workbench
from tests.system.harness import Clients, Service, read_response, wait_until

SHORT = ("--drain-timeout", "300ms")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with the workbench application, version 1, as main.py."""
    found = tmp_path / "app"
    found.mkdir()
    (found / "main.py").write_text(workbench("1"))
    return found


def request(path: str, headers: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: test\r\n{headers}\r\n".encode()


def held(service: Service, path: str, name: str) -> socket.socket:
    """A connection whose request waits in the application for the file `name`."""
    connection = service.connect()
    connection.sendall(request(f"{path}?{name}"))
    wait_until((service.directory / f"{name}.began").exists, "the request is in progress")
    return connection


def is_listening(pid: int) -> bool:
    try:
        found = psutil.Process(pid).net_connections(kind="tcp")
    except psutil.NoSuchProcess:  # it has ended just now
        return False
    return any(connection.status == psutil.CONN_LISTEN for connection in found)


def reload(service: Service, version: str = "2") -> None:
    """Reload, and return when the old workers have begun to drain."""
    old = [worker["pid"] for worker in service.workers()]
    (service.directory / "main.py").write_text(workbench(version))
    assert service.ask({"type": "reload"})["exit_code"] == 0

    def drain_began() -> bool:
        return not any(psutil.pid_exists(pid) and is_listening(pid) for pid in old)

    wait_until(drain_began, "the old workers take nothing new")


def rest(connection: socket.socket) -> bytes:
    """Everything until the end of the connection."""
    data = b""
    while chunk := connection.recv(65536):
        data += chunk
    return data


# --- what exists finishes -------------------------------------------------------------------------------------------


def ask(connection: socket.socket, path: str = "/") -> tuple[bytes, bool]:
    """(body, whether the response announces the end of the connection)"""
    connection.sendall(request(path))
    status, headers, body = read_response(connection)
    assert status == 200
    return body, headers.get("connection") == "close"


def test_a_drain_stops_accepting_at_once_and_finishes_requests_in_progress(directory: Path) -> None:
    with Service(directory) as service, held(service, "/until", "go") as connection:
        reload(service)
        assert {service.get()[2] for _ in range(20)} == {b"2"}
        (directory / "go").touch()
        status, headers, body = read_response(connection)
        assert (status, body) == (200, b"1")
        assert "connection" not in headers
        assert ask(connection) == (b"2", False), "the connection moved"
        service.wait_for_generations(2)


def test_idle_connections_are_closed_after_a_linger_when_the_service_stops(directory: Path) -> None:
    with Service(directory) as service, service.connect() as idle, service.connect() as late:
        for connection in (idle, late):
            assert ask(connection) == (b"1", False)
        with held(service, "/until", "go"):  # or else nothing would show that the drain goes on
            service.signal(signal.SIGTERM)
            announced = False
            while not announced:  # the first ones may still come before the drain
                body, announced = ask(late)
                assert body == b"1"
            assert rest(late) == b""
            assert rest(idle) == b""
            (directory / "go").touch()
        assert service.wait() == 0


def test_a_connection_that_never_got_an_answer_moves(directory: Path) -> None:
    with Service(directory) as service, service.connect() as silent, service.connect() as half:
        half.sendall(b"GET /echo?whole HTTP/1.1\r\nHo")
        wait_until(lambda: service.workers()[0]["connections"] == 2, "both are accepted")
        reload(service)
        service.wait_for_generations(2)
        half.sendall(b"st: test\r\n\r\n")
        status, headers, body = read_response(half)
        assert (status, body) == (200, b"whole")
        assert "connection" not in headers
        assert ask(half) == (b"2", False)
        assert ask(silent) == (b"2", False)


def test_half_a_body_is_waited_for_and_then_the_connection_moves(directory: Path) -> None:
    with Service(directory) as service, service.connect() as connection:
        assert ask(connection) == (b"1", False)
        connection.sendall(b"POST /echo?posted: HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\n\r\nbo")
        service.get()  # by then the worker has read it
        reload(service)
        connection.sendall(b"dy" + request("/"))
        data = b""
        while data.count(b"HTTP/1.1 200 OK") < 2 or not data.endswith(b"2"):
            data += connection.recv(65536)
        assert re.findall(rb"\r\n\r\n(posted:body|2)", data) == [b"posted:body", b"2"], data
        service.wait_for_generations(2)


def test_pipelined_requests_are_answered_in_order(directory: Path) -> None:
    with Service(directory) as service, service.connect() as connection:
        connection.sendall(request("/until?go") + request("/echo?second") + request("/echo?third"))
        wait_until((directory / "go.began").exists, "the first request is in progress")
        reload(service)
        connection.sendall(request("/"))
        (directory / "go").touch()
        data = b""
        while data.count(b"HTTP/1.1 200 OK") < 4 or not data.endswith(b"2"):
            data += connection.recv(65536)
        assert re.findall(rb"\r\n\r\n(1|second|third|2)", data) == [b"1", b"second", b"third", b"2"], data
        service.wait_for_generations(2)


def test_streams_run_on_to_the_last_byte(directory: Path) -> None:
    with Service(directory) as service, held(service, "/stream", "go") as connection:
        reload(service)
        (directory / "go").touch()
        status, _, body = read_response(connection)
        assert (status, body) == (200, b"begin\nend\n")
        service.wait_for_generations(2)


def test_background_tasks_and_the_lifespan_shutdown_run(directory: Path) -> None:
    with Service(directory) as service:
        (old,) = service.workers()
        with held(service, "/background", "go") as connection:
            assert read_response(connection)[2] == b"1"
        reload(service)
        (directory / "go").touch()
        service.wait_for_generations(2)
        assert (directory / "go.done").read_text() == "1"
        assert (directory / f"shutdown-{old['pid']}").read_text() == "1"


# --- WebSockets -----------------------------------------------------------------------------------------------------


def test_a_websocket_runs_on_in_the_old_worker(directory: Path) -> None:
    with Service(directory) as service:
        with connect(f"ws://127.0.0.1:{service.port}/talk") as websocket:
            websocket.send("before")
            assert websocket.recv() == "1:before"
            reload(service)
            websocket.send("after")
            assert websocket.recv() == "1:after"
            holds = hold_of(service)
            assert (holds["kind"], holds["path"]) == ("websocket", "/talk")
        service.wait_for_generations(2)


def test_a_websocket_is_told_1012_at_the_deadline(directory: Path) -> None:
    with (
        Service(directory, "--drain-timeout", "1s") as service,
        connect(f"ws://127.0.0.1:{service.port}/") as websocket,
    ):
        websocket.send("before")
        assert websocket.recv() == "1:before"
        reload(service)
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv(timeout=60)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012
        service.wait_for_generations(2)


# --- what holds it, and its end -------------------------------------------------------------------------------------


def hold_of(service: Service) -> dict[str, object]:
    """The one thing that holds the oldest generation's drain."""
    (worker,) = service.status(drain=True)["generations"][0]["workers"]
    assert worker["state"] == "draining"
    (hold,) = worker["holds"]
    return dict(hold)


def test_status_lists_what_holds_a_drain(directory: Path) -> None:
    with Service(directory) as service, held(service, "/until", "go") as connection:
        host, port = connection.getsockname()
        reload(service)
        hold = hold_of(service)
        assert (hold["kind"], hold["peer"], hold["path"]) == ("request", f"{host}:{port}", "/until")
        assert isinstance(hold["age_seconds"], float)
        shown = service.handoff("status", "--drain")
        assert shown.returncode == 0
        assert re.search(rf"request +{host}:{port} +\S+ +/until", shown.stdout), shown.stdout
        (directory / "go").touch()
        read_response(connection)
        service.wait_for_generations(2)
        assert "nothing drains" in service.handoff("status", "--drain").stdout


def test_a_request_that_hangs_is_cut_at_the_deadline(directory: Path) -> None:
    with Service(directory, *SHORT) as service, held(service, "/until", "never") as connection:
        (old,) = service.workers()
        reload(service)
        assert rest_or_reset(connection) == b""
        service.wait_for_generations(2)
        assert (directory / f"shutdown-{old['pid']}").exists(), "it ended by itself"


def rest_or_reset(connection: socket.socket) -> bytes:
    try:
        return rest(connection)
    except ConnectionResetError:
        return b""


def test_a_worker_that_ignores_everything_is_killed_after_the_deadline(directory: Path) -> None:
    with Service(directory, *SHORT) as service, service.connect() as connection:
        (old,) = service.workers()
        connection.sendall(request("/block?blocked"))
        wait_until((directory / "blocked").exists, "the worker blocks")
        (directory / "main.py").write_text(workbench("2"))
        assert service.ask({"type": "reload"})["exit_code"] == 0
        service.wait_for_generations(2)
        assert not psutil.pid_exists(old["pid"])
        service.stderr.wait_for("from=stopping to=killed")
        assert service.get()[2] == b"2"


def test_the_oldest_generation_is_squeezed_when_there_are_too_many(directory: Path) -> None:
    with Service(directory, "--max-generations", "2") as service:
        with held(service, "/until", "one") as first:
            reload(service, "2")
            with held(service, "/until", "two") as second:
                reload(service, "3")
                assert rest_or_reset(first) == b""
                (directory / "two").touch()
                assert read_response(second)[2] == b"2"
        service.wait_for_generations(3)


# --- stopping -------------------------------------------------------------------------------------------------------


def refuses(service: Service) -> bool:
    try:
        service.connect().close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # it came at the very moment of the close
        return False
    return False


def end_gracefully(service: Service, connection: socket.socket) -> None:
    """New connections are refused at once, what is in progress finishes, and the service ends with 0."""
    wait_until(lambda: refuses(service), "new connections are refused")
    (service.directory / "go").touch()
    status, headers, body = read_response(connection)
    assert (status, body) == (200, b"1")
    assert headers["connection"] == "close"
    assert service.wait() == 0


def test_term_refuses_new_connections_and_finishes_what_is_in_progress(directory: Path) -> None:
    with Service(directory, "-w", "2") as service, held(service, "/until", "go") as connection:
        workers = service.workers()
        service.signal(signal.SIGTERM)
        end_gracefully(service, connection)
        for worker in workers:
            assert (directory / f"shutdown-{worker['pid']}").exists()


def is_draining(service: Service) -> bool:
    return service.status()["generations"][0]["workers"][0]["state"] == "draining"


def test_who_is_queued_when_the_service_stops_is_answered(directory: Path) -> None:
    with Service(directory) as service, contextlib.ExitStack() as stack:
        (worker,) = service.workers()
        os.kill(worker["pid"], signal.SIGSTOP)
        queued = [stack.enter_context(service.connect()) for _ in range(5)]
        for connection in queued:
            connection.sendall(request("/"))
        service.signal(signal.SIGTERM)
        wait_until(lambda: is_draining(service), "the worker was told to drain")
        os.kill(worker["pid"], signal.SIGCONT)
        assert [read_response(connection)[2] for connection in queued] == [b"1"] * 5
        assert service.wait() == 0


def test_who_is_queued_on_a_bind_that_a_reload_removes_is_answered(directory: Path) -> None:
    config = directory / "handoff.toml"
    config.write_text('[bind]\nweb = "127.0.0.1:0"\nadmin = "127.0.0.1:0"\n')
    with Service(directory, bind=None) as service:
        (worker,) = service.workers()
        os.kill(worker["pid"], signal.SIGSTOP)
        addresses = {one["name"]: one["address"] for one in service.status()["listeners"]}
        port = int(addresses["admin"].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(request("/"))
            config.write_text('[bind]\nweb = "127.0.0.1:0"\n')
            assert service.ask({"type": "reload"})["exit_code"] == 0
            os.kill(worker["pid"], signal.SIGCONT)
            assert read_response(connection)[2] == b"1"
        service.wait_for_generations(2)


def test_the_stop_command_waits_for_the_end(directory: Path) -> None:
    with Service(directory) as service, held(service, "/until", "go") as connection:
        stopping = service.begin({"type": "stop"})
        end_gracefully(service, connection)
        answer = stopping.answer()
        assert (answer["exit_code"], answer["message"]) == (0, "stopped")
    with Service(directory) as service:
        done = service.handoff("stop")
        assert (done.returncode, done.stdout) == (0, "web: stopped\n")
        assert service.wait() == 0
        assert service.handoff("stop").returncode == 5


@pytest.mark.parametrize("how", ["term twice", "quit", "stop --now"])
def test_a_stop_at_once_cuts_what_is_in_progress(directory: Path, how: str) -> None:
    with Service(directory) as service, held(service, "/until", "never") as connection:
        match how:
            case "term twice":
                service.signal(signal.SIGTERM)
                wait_until(lambda: refuses(service), "the first one drains")
                service.signal(signal.SIGTERM)
            case "quit":
                service.signal(signal.SIGQUIT)
            case _:
                assert service.handoff("stop", "--now").returncode == 0
        assert rest_or_reset(connection) == b""
        assert service.wait() == 0


def test_one_draining_generation_can_be_stopped(directory: Path) -> None:
    with Service(directory) as service, Clients(service.get, 2) as clients:
        assert service.handoff("stop", "--generation", "1").returncode == 9
        assert service.handoff("stop", "--generation", "7").returncode == 9
        with held(service, "/until", "never") as connection:
            reload(service)
            done = service.handoff("stop", "--generation", "1")
            assert done.returncode == 0, done.stderr
            assert rest_or_reset(connection) == b""
        service.wait_for_generations(2)
    clients.assert_none_failed()
