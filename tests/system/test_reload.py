"""Reloads under load lose nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from handoff.master.yielding import STEPS, may_take_back
from handoff.worker.collector import BOOT_THRESHOLD, SERVING_THRESHOLD
from tests.system.apps import gated, hello, workbench
from tests.system.harness import Clients, Service, read_response, wait_until

STREAM = b"".join(b"%d\n" % number for number in range(20)) + b"end"


class KeptAlive:
    """A strict client that keeps its one connection, in each thread, for ever: none is closed by a reload."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._local = threading.local()
        self._open: set[socket.socket] = set()

    def __call__(self) -> None:
        connection: socket.socket | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._service.connect()
            self._open.add(connection)
        try:
            connection.sendall(b"POST /echo HTTP/1.1\r\nHost: test\r\nContent-Length: 5\r\n\r\nhello")
            status, headers, body = read_response(connection)
            assert (status, body) == (200, b"hello")
            assert "connection" not in headers, "the connection is to end"
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        self._open.discard(self._local.connection)
        self._local.connection.close()
        self._local.connection = None

    def close(self) -> None:
        """When its threads have ended."""
        for connection in self._open:
            connection.close()


def new_connection(service: Service) -> None:
    status, _, body = service.get()
    assert status == 200
    assert body.isdigit()


def slow(service: Service) -> None:
    status, _, body = service.get("/slow?0.3")
    assert status == 200
    assert body.startswith(b"slow ")


def stream(service: Service) -> None:
    status, _, body = service.get("/stream")
    assert (status, body) == (200, STREAM)


def labels(service: Service) -> dict[int, str]:
    return {one["generation"]: one["label"] for one in service.status()["generations"]}


def live_version(service: Service) -> bytes:
    return service.get()[2]


def test_a_reload_brings_the_new_code(directory: Path) -> None:
    with Service(directory, "-w", "2") as service:
        assert live_version(service) == b"1"
        (directory / "main.py").write_text(hello("2"))
        done = service.reload()
        assert done.returncode == 0, done.stderr
        assert "generation 2 is live" in done.stdout
        service.wait_for_generations(2)
        assert live_version(service) == b"2"


NICENESS = """
import os, threading

WHILE_BOOTING = os.getpriority(os.PRIO_PROCESS, 0)

async def app(scope, receive, send):
    assert scope["type"] == "http"
    threads = {os.getpriority(os.PRIO_PROCESS, int(one)) for one in os.listdir("/proc/self/task")}
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": f"{WHILE_BOOTING} {threads}".encode()})
"""


def test_workers_that_boot_for_a_reload_leave_the_processor_to_those_that_serve(directory: Path) -> None:
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    (directory / "main.py").write_text(NICENESS)
    with Service(directory) as service:
        assert live_version(service) == f"{ours} {{{ours}}}".encode()
        assert service.reload().returncode == 0
        service.wait_for_generations(2)
        booting = min(ours + STEPS, 14) if may_take_back(ours) else ours
        assert live_version(service) == f"{booting} {{{ours}}}".encode()


PACED = """
import sys

def pauses():
    return any(type(finder).__name__ == "Pacer" for finder in sys.meta_path)

WHILE_BOOTING = pauses()

async def app(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": f"{WHILE_BOOTING} {pauses()}".encode()})
"""


def test_only_a_boot_that_others_serve_beside_pauses_between_its_imports(directory: Path) -> None:
    (directory / "main.py").write_text(PACED)
    with Service(directory) as service:
        assert live_version(service) == b"False False"
        assert service.reload().returncode == 0
        service.wait_for_generations(2)
        assert live_version(service) == b"True False"


COLLECTOR = """
import gc

WHILE_BOOTING = gc.get_threshold()[0]

async def app(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    found = f"{WHILE_BOOTING} {gc.get_threshold()[0]} {gc.get_freeze_count() > 1000}"
    await send({"type": "http.response.body", "body": found.encode()})
"""


def test_the_collector_looks_seldom_in_a_boot_and_not_at_what_it_made(directory: Path) -> None:
    (directory / "main.py").write_text(COLLECTOR)
    with Service(directory) as service:
        assert live_version(service) == f"{BOOT_THRESHOLD} {SERVING_THRESHOLD} True".encode()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("loop", "reloads"), [("uvloop", 20), ("asyncio", 4)])
def test_reloads_under_all_kinds_of_clients_lose_nothing(directory: Path, loop: str, reloads: int) -> None:
    # So many generations that none is squeezed, however slowly its streams go.
    options = ("-w", "2", "--loop", loop, "--max-generations", "30")
    with Service(directory, *options) as service, contextlib.closing(KeptAlive(service)) as kept_alive:
        kinds = {
            "new": Clients(lambda: new_connection(service), 3),
            "kept alive": Clients(kept_alive, 3),
            "slow": Clients(lambda: slow(service), 3),
            "stream": Clients(lambda: stream(service), 3),
        }
        with contextlib.ExitStack() as running:
            for clients in kinds.values():
                running.enter_context(clients)
            for number in range(2, reloads + 2):
                (directory / "main.py").write_text(hello(str(number)))
                assert service.ask({"type": "reload"})["exit_code"] == 0
                kinds["new"].more(5)
            for clients in kinds.values():
                clients.more(1)
    for kind, clients in kinds.items():
        assert not clients.failures, f"{kind}: {len(clients.failures)} of {clients.done}: {clients.failures[:5]}"


def test_a_verdict_comes_when_the_old_workers_accept_nobody_and_names_who_did_not_say_so(directory: Path) -> None:
    with Service(directory, "-w", "2") as service:
        frozen = service.workers()[0]
        os.kill(frozen["pid"], signal.SIGSTOP)
        done = service.reload()
        os.kill(frozen["pid"], signal.SIGCONT)
        assert done.returncode == 0, done.stderr
        text = "generation 2 is live; it is not known yet that the old accept nobody any more: worker "
        assert f"{text}{frozen['worker']} (" in done.stdout
        service.wait_for_generations(2)
        done = service.reload()
        assert done.returncode == 0, done.stderr
        assert "generation 3 is live (" in done.stdout


def test_the_number_of_workers_changes_in_the_same_reload(directory: Path) -> None:
    config = directory / "handoff.toml"
    config.write_text("workers = 1\n")
    with Service(directory) as service, Clients(service.get, 2) as clients:
        for generation, workers in ((2, 3), (3, 1)):
            config.write_text(f"workers = {workers}\n")
            (directory / "main.py").write_text(hello(str(generation)))
            assert service.ask({"type": "reload"})["exit_code"] == 0
            service.wait_for_generations(generation)
            assert [worker["slot"] for worker in service.workers()] == list(range(workers))
        assert live_version(service) == b"3"
    clients.assert_none_failed()


def test_binds_are_added_changed_and_removed_by_reloads(directory: Path) -> None:
    config, first_path, second_path = directory / "handoff.toml", directory / "one.sock", directory / "two.sock"
    web = 'web = "127.0.0.1:0"\n'
    config.write_text(f"[bind]\n{web}")

    def reload(text: str, generation: int) -> dict[str, str]:
        config.write_text(f"[bind]\n{web}{text}")
        assert service.ask({"type": "reload"})["exit_code"] == 0
        service.wait_for_generations(generation)
        return {listener["name"]: listener["address"] for listener in service.status()["listeners"]}

    with Service(directory, bind=None) as service, Clients(service.get, 2) as clients:
        added = reload(f'admin = "127.0.0.1:0"\nlocal = "unix:{first_path}"\n', 2)
        assert added["web"] == f"127.0.0.1:{service.port}"
        admin_port = int(added["admin"].rpartition(":")[2])
        assert answers(socket.create_connection(("127.0.0.1", admin_port)))
        assert answers(unix(first_path))

        changed = reload(f'admin = "127.0.0.1:0"\nlocal = "unix:{second_path}"\n', 3)
        assert changed["admin"] == added["admin"], "port 0 stays the port that it was given"
        assert answers(unix(second_path))
        assert not first_path.exists()

        assert set(reload("", 4)) == {"web"}
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", admin_port))
        assert not second_path.exists()
    clients.assert_none_failed()


def queue_lengths(port: int) -> set[int]:
    """How many connections may wait, of the listeners on this port."""
    shown = subprocess.run(["ss", "-ltnH", f"sport = :{port}"], capture_output=True, text=True, check=True).stdout
    return {int(line.split()[2]) for line in shown.splitlines()}


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_the_path_of_a_unix_socket_and_the_backlog_stay_through_reloads(directory: Path, loop: str) -> None:
    """Event loops listen again on what they are given, with a backlog of 100, and unlink paths that they close."""
    path = directory / "web.sock"
    with Service(directory, "--loop", loop, "--backlog", "321", "--bind", f"local=unix:{path}") as service:
        inode = path.stat().st_ino
        for generation in (2, 3):
            assert service.ask({"type": "reload"})["exit_code"] == 0
            service.wait_for_generations(generation)
            assert path.stat().st_ino == inode
            assert answers(unix(path))
            assert queue_lengths(service.port) == {321}
    assert not path.exists()


def test_a_removed_bind_refuses_new_connections_while_the_old_generation_drains(directory: Path) -> None:
    (directory / "main.py").write_text(workbench("1"))
    config = directory / "handoff.toml"
    config.write_text('[bind]\nweb = "127.0.0.1:0"\nadmin = "127.0.0.1:0"\n')
    with Service(directory, bind=None) as service:
        listeners = {one["name"]: one["address"] for one in service.status()["listeners"]}
        admin_port = int(listeners["admin"].rpartition(":")[2])
        with service.connect() as held:
            held.sendall(b"GET /until?go HTTP/1.1\r\nHost: test\r\n\r\n")
            wait_until((directory / "go.began").exists, "the request is in progress")
            config.write_text('[bind]\nweb = "127.0.0.1:0"\n')
            assert service.ask({"type": "reload"})["exit_code"] == 0
            wait_until(lambda: is_refused(admin_port), "the removed bind refuses connections")
            (directory / "go").touch()
            assert read_response(held)[2] == b"1"
        service.wait_for_generations(2)


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # it came at the very moment of the close
        return False
    return False


def unix(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return connection


def answers(connection: socket.socket) -> bool:
    with connection:
        connection.settimeout(60)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
        return read_response(connection)[0] == 200


def test_a_surge_of_one_replaces_worker_by_worker(directory: Path) -> None:
    largest = 0
    with Service(directory, "-w", "4", "--surge", "1") as service, Clients(service.get, 3) as clients:

        def look() -> None:
            nonlocal largest
            largest = max(largest, len(service.workers()))

        with Clients(look, 1) as watcher:
            for generation in (2, 3):
                (directory / "main.py").write_text(hello(str(generation)))
                answer = service.ask({"type": "reload"})
                assert answer["exit_code"] == 0
                assert "1 of 4 workers" in answer["message"]
                service.wait_for_generations(generation)
                assert len(service.workers()) == 4
        assert live_version(service) == b"3"
    clients.assert_none_failed()
    watcher.assert_none_failed()
    assert largest == 5


def test_hup_reloads(directory: Path) -> None:
    with Service(directory) as service:
        (directory / "main.py").write_text(hello("2"))
        service.signal(signal.SIGHUP)
        service.stderr.wait_for("verdict: generation 2 is live")
        service.wait_for_generations(2)
        assert live_version(service) == b"2"


def test_many_requests_at_once_become_one_reload_with_the_last_label(directory: Path) -> None:
    with Service(directory) as service:
        (directory / "main.py").write_text(gated("2"))
        first = service.begin({"type": "reload", "label": "first"})
        wait_until((directory / "importing").exists, "the first reload boots")
        others = [service.begin({"type": "reload", "label": f"v{number}"}) for number in range(20)]
        last = service.ask({"type": "reload", "label": "last", "wait": False})  # answered when all before were read
        assert last["exit_code"] == 0
        (directory / "go").touch()
        assert first.answer()["generation"] == 2
        answers = [other.answer() for other in others]
        assert {(answer["exit_code"], answer["generation"]) for answer in answers} == {(0, 3)}
        service.wait_for_generations(3)
        assert labels(service) == {3: "last"}


def test_a_reload_during_the_first_boot_follows_it(directory: Path) -> None:
    (directory / "main.py").write_text(gated("1"))
    with Service(directory).launch() as service:
        wait_until((directory / "importing").exists, "the first boot goes on")
        asked = service.begin({"type": "reload", "label": "second"})
        service.status()
        (directory / "go").touch()
        answer = asked.answer()
        assert (answer["exit_code"], answer["generation"]) == (0, 2)
        service.wait_for_generations(2)
        assert labels(service) == {2: "second"}


def test_a_label_and_the_generation_reach_status_workers_log_and_clients(directory: Path) -> None:
    (directory / "main.py").write_text(workbench("1"))
    with Service(directory, "--generation-header", "--label", "v1") as service:
        _, headers, body = service.get("/environment")
        assert headers["handoff-generation"] == "1"
        environment = json.loads(body)
        assert environment == {
            "HANDOFF_NAME": "web",
            "HANDOFF_GENERATION": "1",
            "HANDOFF_LABEL": "v1",
            "HANDOFF_SLOT": "0",
            "HANDOFF_RUNTIME_DIRECTORY": str(service.run_dir / service.name),
        }
        assert service.reload("--label", "v2").returncode == 0
        service.wait_for_generations(2)
        assert labels(service) == {2: "v2"}
        _, headers, body = service.get("/environment")
        assert headers["handoff-generation"] == "2"
        assert json.loads(body) == environment | {"HANDOFF_LABEL": "v2", "HANDOFF_GENERATION": "2"}
        service.stdout.wait_for("/environment.*generation=2 label=v2")
        assert service.reload().returncode == 0  # without a label: the first version's is not this one's
        service.wait_for_generations(3)
        assert labels(service) == {3: ""}
