"""Connections of programs' own protocols move: a chat, an echo on selectors, and what must not move."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import DEADLINE_SECONDS, Service, wait_until

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(EXAMPLES / name, tmp_path / name))


def moves(service: Service) -> dict[str, int]:
    found: dict[str, int] = service.status()["moves"]
    return found


def reload(service: Service) -> None:
    done = service.ask({"type": "reload"})
    assert done["exit_code"] == 0, done
    service.wait_for_generations(service.status()["live"])


class Member:
    """One client of the chat, whose connection is never made anew."""

    def __init__(self, service: Service, name: str) -> None:
        self.connection = service.connect()
        self.lines = self.connection.makefile("rb")
        self.say(name)
        assert self.hear() == f"hello {name}"

    def say(self, line: str) -> None:
        self.connection.sendall(f"{line}\n".encode())

    def hear(self) -> str:
        return self.lines.readline().decode().strip()

    def close(self) -> None:
        self.lines.close()
        self.connection.close()


@contextlib.contextmanager
def members(service: Service, *names: str) -> Iterator[list[Member]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contextlib.closing(Member(service, name))) for name in names]


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_chat_goes_on_through_reloads_with_names_and_half_lines(tmp_path: Path, loop: str) -> None:
    directory = example("chat", tmp_path)
    with (
        Service(directory, "--loop", loop, app="main:main") as service,
        members(service, "ada", "bob") as (ada, bob),
    ):
        for number in range(5):
            ada.connection.sendall(f"line {number} ".encode())  # only half of it
            bob.say(f"from bob {number}")
            assert (ada.hear(), bob.hear()) == (f"bob: from bob {number}",) * 2
            reload(service)
            ada.say("ends")
            assert (ada.hear(), bob.hear()) == (f"ada: line {number} ends",) * 2
        assert moves(service)["moved"] == moves(service)["adopted"] == 10


@pytest.mark.parametrize("name", ["selectors_echo", "chat"])
def test_every_byte_comes_once_and_in_order_while_reloads_go_on(tmp_path: Path, name: str) -> None:
    directory = example(name, tmp_path)
    with Service(directory, app="main:main") as service, service.connect() as connection:
        prefix = b""
        if name == "chat":
            connection.sendall(b"ada\n")
            assert connection.recv(100) == b"hello ada\n"
            prefix = b"ada: "
        stop, sent = threading.Event(), [0]

        def send() -> None:
            while not stop.wait(0.001):
                connection.sendall(b"%d\n" % sent[0])
                sent[0] += 1

        received = bytearray()

        def receive() -> None:
            while chunk := connection.recv(65536):
                received.extend(chunk)

        threads = [threading.Thread(target=send), threading.Thread(target=receive)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(4):
                reload(service)
        finally:
            stop.set()
            threads[0].join(DEADLINE_SECONDS)
        expected = b"".join(prefix + b"%d\n" % number for number in range(sent[0]))
        wait_until(lambda: len(received) >= len(expected), "everything came back")
        connection.shutdown(socket.SHUT_RDWR)
        threads[1].join(DEADLINE_SECONDS)
        assert bytes(received) == expected
        assert moves(service)["adopted"] >= 4


NOT_NOW = """
import asyncio, handoff, os

class Careful(handoff.Protocol):
    def connection_made(self, transport):
        self.transport = transport
        self.may_go = False

    def data_received(self, data):
        if data == b"go":
            self.may_go = True
            self.quiet()
        self.transport.write(b"%d:" % os.getpid() + data)

    def detach(self):
        return b"state" if self.may_go else None

    def attach(self, state):
        assert state == b"state"

async def main(worker):
    await worker.serve(Careful)
"""


def test_a_protocol_moves_when_it_says_so_and_not_before(directory: Path) -> None:
    (directory / "main.py").write_text(NOT_NOW)
    with Service(directory, app="main:main") as service, service.connect() as connection:

        def ask(word: bytes) -> int:
            connection.sendall(word)
            pid, _, said = connection.recv(100).partition(b":")
            assert said == word
            return int(pid)

        old = ask(b"one")
        done = service.ask({"type": "reload"})
        assert done["exit_code"] == 0
        wait_until(lambda: [one["state"] for one in service.workers(1)] == ["draining"], "the old worker drains")
        assert ask(b"two") == old
        assert ask(b"go") == old
        service.wait_for_generations(2)
        assert ask(b"three") == service.workers()[0]["pid"] != old


TAKES_NONE = """
import asyncio, os

class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(b"%d" % os.getpid())

async def main(worker):
    await worker.serve(Echo)
"""


def test_nothing_is_sent_to_a_program_that_adopts_nothing(tmp_path: Path) -> None:
    directory = example("chat", tmp_path)
    with Service(directory, "--drain-timeout", "1s", app="main:main") as service, members(service, "ada") as (ada,):
        (directory / "main.py").write_text(TAKES_NONE)
        assert service.ask({"type": "reload"})["exit_code"] == 0
        ada.say("still here")
        assert ada.hear() == "ada: still here"
        service.wait_for_generations(2)  # at the deadline
        assert moves(service) == {"moved": 0, "waiting": 0, "adopted": 0, "refused": 0}


OTHER_LISTENER = """
import handoff
class Echo(handoff.Protocol):
    def connection_made(self, transport):
        self.transport = transport
    def data_received(self, data):
        self.transport.write(data)
    def detach(self):
        return b""
async def main(worker):
    await worker.serve(Echo)
"""


def test_a_connection_of_a_listener_that_is_gone_is_refused_and_counted(directory: Path) -> None:
    (directory / "main.py").write_text(OTHER_LISTENER)
    config = directory / "handoff.toml"
    config.write_text('[bind]\nweb = "127.0.0.1:0"\nother = "127.0.0.1:0"\n')
    with Service(directory, app="main:main", bind=None) as service:
        addresses = {one["name"]: one["address"] for one in service.status()["listeners"]}
        port = int(addresses["other"].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(b"hi")
            assert connection.recv(10) == b"hi"
            config.write_text('[bind]\nweb = "127.0.0.1:0"\n')
            reload(service)
            assert connection.recv(10) == b""
        assert moves(service)["refused"] == 1


def has_shares(service: Service, count: int, workers: int) -> bool:
    """Within 20 % of even."""
    found = [worker["connections"] for worker in service.workers()]
    even = count / workers
    return len(found) == workers and sum(found) == count and all(abs(one - even) <= 0.2 * even for one in found)


@pytest.mark.parametrize("name", ["chat", "selectors_echo"])
def test_workers_share_connections_of_programs_evenly(tmp_path: Path, name: str) -> None:
    with Service(example(name, tmp_path), "-w", "2", app="main:main") as service, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(service.connect()) for _ in range(20)]
        wait_until(lambda: has_shares(service, 20, 2), "two have their shares")
        assert service.ask({"type": "scale", "workers": 4})["exit_code"] == 0
        wait_until(lambda: has_shares(service, 20, 4), "four have their shares")
        for client in clients:
            client.sendall(b"ada\n")
            assert client.recv(100).strip() in (b"ada", b"hello ada")


STATES = """
import handoff

class Careless(handoff.Protocol):
    word = b""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.word = data
        self.transport.write(data)

    def detach(self):
        if self.word == b"no bytes":
            return "text"
        if self.word.startswith(b"large"):
            return self.word.ljust(17 * 1024 * 1024)
        return self.word

    def attach(self, state):
        if b"bad" in state:
            raise ValueError("this state is of another release")

async def main(worker):
    await worker.serve(Careless)
"""


def said(connection: socket.socket, word: bytes) -> bool:
    """Whether it is served."""
    try:
        connection.sendall(word)
        return connection.recv(100) == word
    except ConnectionError:
        return False


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_what_is_wrong_with_one_state_hurts_no_other_connection(directory: Path, loop: str) -> None:
    (directory / "main.py").write_text(STATES)
    words = [b"a", b"bad", b"no bytes", b"large", b"large bad", b"b"]
    options = ("--loop", loop, "--drain-timeout", "3s")
    with Service(directory, *options, app="main:main") as service, contextlib.ExitStack() as stack:
        connections = {word: stack.enter_context(service.connect()) for word in words}
        for word, connection in connections.items():
            assert said(connection, word)
        assert service.ask({"type": "reload"})["exit_code"] == 0
        wait_until(lambda: moves(service)["refused"] == 3, "one was refused there, and two were here")
        assert connections[b"bad"].recv(1) == connections[b"large bad"].recv(1) == b""
        for word in (b"no bytes", b"large"):  # they stay
            assert said(connections[word], word)
        service.wait_for_generations(2)  # at the deadline
        assert [said(connections[word], b"again") for word in words] == [True, False, False, False, False, True]
        assert moves(service) == {"moved": 3, "waiting": 0, "adopted": 2, "refused": 3}
        wait_until(lambda: [one["connections"] for one in service.workers()] == [2], "nobody is kept")


ONLY_AT_RELOADS = """
import handoff

class Loyal(handoff.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(data)

    def detach(self):
        return b"" if worker.draining else None

async def main(given):
    global worker
    worker = given
    await worker.serve(Loyal)
"""


def test_what_was_asked_in_vain_to_go_to_a_sibling_is_asked_again_at_a_drain(directory: Path) -> None:
    (directory / "main.py").write_text(ONLY_AT_RELOADS)
    with Service(directory, app="main:main") as service, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(service.connect()) for _ in range(10)]
        assert all(said(client, b"before") for client in clients)
        assert service.ask({"type": "scale", "workers": 2})["exit_code"] == 0
        reload(service)
        assert all(said(client, b"after") for client in clients)
        assert moves(service)["refused"] == 0
