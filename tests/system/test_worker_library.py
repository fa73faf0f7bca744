"""Programs that serve by themselves: `async def main(worker)` and `def main(worker)`."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from tests.system.harness import Clients, Service, wait_until

ECHO = """
import asyncio
VERSION = "@VERSION@"

class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(VERSION.encode() + b":" + data)

async def main(worker):
    await worker.serve(Echo)
"""

BLOCKING = """
import selectors
VERSION = "@VERSION@"

def main(worker):
    listener = worker.listeners["default"]
    selector = selectors.DefaultSelector()
    if not worker.ready():
        return
    selector.register(worker, selectors.EVENT_READ)
    selector.register(listener, selectors.EVENT_READ)
    clients, is_accepting = set(), True
    while clients or is_accepting:
        for key, _ in selector.select(worker.drain_seconds):
            if key.fileobj is worker:
                worker.wait(0)
            elif key.fileobj is listener:
                try:
                    client, _ = listener.accept()
                except BlockingIOError:
                    continue  # another worker was quicker
                clients.add(client)
                selector.register(client, selectors.EVENT_READ)
            else:
                answer(key.fileobj, selector, clients)
        if worker.draining and is_accepting:
            selector.unregister(listener)
            is_accepting = False
        if worker.drain_seconds == 0:
            return

def answer(client, selector, clients):
    data = client.recv(4096)
    if data:
        client.sendall(VERSION.encode() + b":" + data)
    else:
        selector.unregister(client)
        clients.discard(client)
        client.close()
"""

FORMS = {"async": ECHO, "blocking": BLOCKING}


def program(text: str, version: str) -> str:
    return text.replace("@VERSION@", version)


@pytest.fixture(params=FORMS)
def text(request: pytest.FixtureRequest, directory: Path) -> str:
    """Each form of program; version 1 is in main.py."""
    found = FORMS[request.param]
    (directory / "main.py").write_text(program(found, "1"))
    return found


def ask(connection: socket.socket, word: bytes = b"hi") -> bytes:
    """One exchange with an echo program."""
    connection.sendall(word)
    answer = b""
    while not answer.endswith(b":" + word):
        data = connection.recv(100)
        assert data, f"the connection ended after {answer!r}"
        answer += data
    return answer


def ask_anew(service: Service) -> bytes:
    with service.connect() as connection:
        return ask(connection)


# --- serving --------------------------------------------------------------------------------------------------------


def test_a_program_serves_on_its_listener_and_is_told_apart_from_asgi_and_wsgi(directory: Path, text: str) -> None:
    with Service(directory, "--workers", "2", app="main:main") as service:
        assert ask_anew(service) == b"1:hi"
        assert [worker["interface"] for worker in service.workers()] == ["handoff", "handoff"]


def test_connected_clients_finish_while_a_reload_drains_their_worker(directory: Path, text: str) -> None:
    with Service(directory, app="main:main") as service, service.connect() as old:
        assert ask(old) == b"1:hi"
        (directory / "main.py").write_text(program(text, "2"))
        done = service.reload()
        assert done.returncode == 0, done.stderr
        assert ask_anew(service) == b"2:hi"
        assert ask(old, b"still here") == b"1:still here"
        old.close()
        service.wait_for_generations(2)


AT_WORK = """
import pathlib, time

def main(worker):
    if worker.ready():
        while not pathlib.Path("done").exists():
            time.sleep(0.01)
"""


def test_a_verdict_does_not_wait_for_a_program_without_listeners_that_is_at_work(directory: Path) -> None:
    (directory / "main.py").write_text(AT_WORK)
    with Service(directory, "--bind", "none", app="main:main", bind=None) as service:
        done = service.reload()
        assert done.returncode == 0, done.stderr
        assert "generation 2 is live (" in done.stdout
        (directory / "done").touch()


def test_reloads_under_clients_lose_none(directory: Path, text: str) -> None:
    with Service(directory, "--workers", "2", app="main:main") as service:
        with Clients(lambda: ask_anew(service)) as clients:
            clients.more(10)
            for version in "23":
                (directory / "main.py").write_text(program(text, version))
                done = service.reload()
                assert done.returncode == 0, done.stderr
                clients.more(10)
        clients.assert_none_failed()
        assert ask_anew(service) == b"3:hi"


def test_a_drain_ends_at_its_deadline_although_a_client_stays(directory: Path, text: str) -> None:
    with Service(directory, "--drain-timeout", "300ms", app="main:main") as service, service.connect() as old:
        assert ask(old) == b"1:hi"
        done = service.reload()
        assert done.returncode == 0, done.stderr
        service.wait_for_generations(2)
        with pytest.raises((AssertionError, OSError)):
            ask(old)


def test_stopping_waits_for_clients_and_exits_with_success(directory: Path, text: str) -> None:
    with Service(directory, app="main:main") as service, service.connect() as old:
        assert ask(old) == b"1:hi"
        stopping = service.begin({"type": "stop"})
        wait_until(lambda: service.workers()[0]["state"] == "draining", "the worker drains")
        assert ask(old) == b"1:hi"
        old.close()
        stopping.answer()
        assert service.wait() == 0


# --- what a worker knows --------------------------------------------------------------------------------------------

TELLS = """
import asyncio, json, os

async def main(worker):
    facts = {
        "name": worker.name, "generation": worker.generation, "label": worker.label, "slot": worker.slot,
        "listeners": sorted(worker.listeners), "draining": worker.draining, "drain_seconds": worker.drain_seconds,
        "blocking": worker.listeners["default"].getblocking(), "environment": os.environ["HANDOFF_GENERATION"],
        "arguments": worker.arguments, "directory": os.environ["HANDOFF_RUNTIME_DIRECTORY"],
    }

    class Tell(asyncio.Protocol):
        def connection_made(self, transport):
            transport.write(json.dumps(facts).encode())
            transport.close()

    await worker.serve(Tell, ["default"])
"""


def test_a_worker_knows_who_it_is_and_what_is_bound(directory: Path) -> None:
    (directory / "main.py").write_text(TELLS)
    (directory / "handoff.toml").write_text("[arguments]\nlimit = 3\n")
    with Service(directory, "--label", "blue", app="main:main") as service:
        with service.connect() as connection:
            facts = json.loads(b"".join(iter(lambda: connection.recv(4096), b"")))
        assert facts == {
            "name": "web",
            "generation": 1,
            "label": "blue",
            "slot": 0,
            "listeners": ["default"],
            "draining": False,
            "drain_seconds": None,
            "blocking": False,
            "environment": "1",
            "arguments": {"limit": 3},
            "directory": str(service.run_dir / "web"),
        }


def test_a_listener_that_the_program_does_not_serve_is_logged_and_closed_in_the_worker(directory: Path) -> None:
    (directory / "main.py").write_text(TELLS)
    with Service(directory, "--bind", "metrics=127.0.0.1:0", app="main:main") as service:
        service.stderr.wait_for(r"warning handoff listener is not served by the application listener=metrics")
        (worker,) = [one for one in service.family() if "handoff" in " ".join(one.cmdline())]
        assert len([one for one in worker.net_connections("tcp") if one.status == "LISTEN"]) == 1


WAITS = """
import os

def main(worker):
    assert not worker.draining
    assert worker.wait(0) is False, "nothing is asked for yet"
    if not worker.ready():
        return
    assert isinstance(worker.fileno(), int)
    with open("open", "w"):
        pass
    while not worker.wait():
        raise AssertionError("wait() came back without a drain")
    assert 0 < worker.drain_seconds <= 30
    with open("drained", "w"):
        pass
"""


def test_a_blocking_program_may_do_nothing_but_wait_for_its_drain(directory: Path) -> None:
    """A consumer of a queue, for example: it has no listener."""
    (directory / "main.py").write_text(WAITS)
    with Service(directory, app="main:main") as service:
        wait_until((directory / "open").exists, "the commit reached the program")
        assert not (directory / "drained").exists()
        service.ask({"type": "stop"})
        assert service.wait() == 0
        assert (directory / "drained").exists()


def test_a_worker_that_is_sent_term_drains_and_is_replaced(directory: Path, text: str) -> None:
    with Service(directory, app="main:main") as service, service.connect() as old:
        assert ask(old) == b"1:hi"
        (worker,) = service.workers()
        (process,) = [one for one in service.family() if one.pid == worker["pid"]]
        process.terminate()
        wait_until(lambda: any(one["pid"] != worker["pid"] for one in service.workers()), "a replacement")
        assert ask(old) == b"1:hi"
        old.close()
        wait_until(lambda: [one["state"] for one in service.workers()] == ["accepting"], "the old one ended")
        assert ask_anew(service) == b"1:hi"


# --- what goes wrong ------------------------------------------------------------------------------------------------

RAISES = {
    "async": "async def main(worker):\n    connect()\n\ndef connect():\n    raise OSError('no database')\n",
    "blocking": "def main(worker):\n    connect()\n\ndef connect():\n    raise OSError('no database')\n",
    "async instance": (
        "class Main:\n    async def __call__(self, worker):\n        connect()\n\nmain = Main()\n\n"
        "def connect():\n    raise OSError('no database')\n"
    ),
}


@pytest.mark.parametrize("broken", RAISES.values(), ids=list(RAISES))
def test_an_exception_before_ready_is_rolled_back_with_the_programs_traceback(directory: Path, broken: str) -> None:
    (directory / "main.py").write_text(program(ECHO, "1"))
    with Service(directory, app="main:main") as service:
        (directory / "main.py").write_text(broken)
        done = service.reload()
        assert done.returncode == 3
        assert "main(worker): OSError: no database" in done.stderr
        assert "in connect" in done.stderr + service.stderr.text
        assert "handoff/worker" not in done.stderr
        assert ask_anew(service) == b"1:hi"


def test_a_program_that_ends_before_it_is_ready_is_rolled_back(directory: Path) -> None:
    (directory / "main.py").write_text(program(ECHO, "1"))
    with Service(directory, app="main:main") as service:
        (directory / "main.py").write_text("def main(worker):\n    return\n")
        done = service.reload()
        assert done.returncode == 3
        assert "exited with status 0 while it was in main(worker), which is to call worker.ready()" in done.stderr
        assert ask_anew(service) == b"1:hi"


def test_a_program_that_never_says_ready_is_rolled_back_when_its_time_is_over(directory: Path) -> None:
    (directory / "main.py").write_text(program(ECHO, "1"))
    with Service(directory, app="main:main") as service:
        (directory / "main.py").write_text("def main(worker):\n    worker.wait()\n")
        (directory / "handoff.toml").write_text('boot-timeout = "5s"\n')
        done = service.reload()
        assert done.returncode == 3, done
        assert "not ready after 5.0 s; it was in main(worker), which is to call worker.ready()" in done.stderr
        assert ask_anew(service) == b"1:hi"
        service.wait_for_generations(1)


def test_a_check_of_a_program_that_checks_itself_is_refused(directory: Path) -> None:
    (directory / "main.py").write_text(program(ECHO, "1"))
    service = Service(directory, "--check", "/", app="main:main").launch()
    with service:
        assert service.wait() != 0
        assert "checks itself before worker.ready(); remove the option" in service.stderr.finish()


def test_a_listener_that_is_not_bound_is_named(directory: Path) -> None:
    (directory / "main.py").write_text("def main(worker):\n    worker.listeners['metrics']\n")
    service = Service(directory, app="main:main").launch()
    with service:
        assert service.wait() != 0
        assert "KeyError: 'metrics'" in service.stderr.finish()


# --- a worker of another release ------------------------------------------------------------------------------------

OTHER_RELEASE = """#!{python}
import os, socket
channel = socket.socket(fileno=int(os.environ["HANDOFF_CHANNEL"]))
channel.send(b'{{"type": "hello", "protocol": 999, "release": "9.9.9"}}')
channel.recv(1)
"""


def test_an_interpreter_with_another_release_is_a_failed_start_that_names_both_versions(directory: Path) -> None:
    fake = directory / "python"
    fake.write_text(OTHER_RELEASE.format(python=sys.executable))
    fake.chmod(0o755)
    service = Service(directory, "--python", str(fake)).launch()
    with service:
        assert service.wait() != 0
        assert "handoff 9.9.9 speaks protocol 999, this master serves 1" in service.stderr.finish()
