"""A relay worker's connections on real sockets, its loop stepped by hand: choice, retries, queue, limits, headers."""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from handoff.core.proxy_protocol import encode_v1, encode_v2
from lb.core.model import Timeouts
from lb.core.table import Closing, Endpoint, Route, Table
from lb.page import CURRENT, FAILED, RECEIVED_BYTES, RESET, SENT_BYTES, TOTAL, Page
from lb.relay import connecting
from lb.relay.acceptor import Acceptor
from lb.relay.access_log import AccessLog
from lb.relay.engine import CLIENTS_FIRST, Engine
from lb.relay.loop import Loop
from lb.relay.relay import Relay
from lb.relay.targets import Target

DEADLINE_SECONDS = 20.0


class Backend:
    """A listener that the test accepts from by hand."""

    def __init__(self, path: str | None = None) -> None:
        self.listener = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
        self.listener.bind(path or ("127.0.0.1", 0))
        self.listener.listen(100)
        self.listener.setblocking(False)
        self.address = f"unix:{path}" if path else f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.accepted: list[socket.socket] = []

    def look(self) -> int:
        """How many connections it has had."""
        while True:
            try:
                connection, _ = self.listener.accept()
            except BlockingIOError:
                return len(self.accepted)
            connection.setblocking(False)
            self.accepted.append(connection)

    def close(self) -> None:
        self.listener.close()
        for one in self.accepted:
            one.close()


class Full:
    """A listener whose queue is full: who connects there gets no answer."""

    def __init__(self) -> None:
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(0)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._fillers = [socket.socket() for _ in range(3)]
        for filler in self._fillers:
            filler.setblocking(False)
            assert filler.connect_ex(self._listener.getsockname()) in (0, errno.EINPROGRESS)

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self._listener, *self._fillers):
            one.close()


class Rig:
    """An engine with one service and its listener."""

    def __init__(self, tmp_path: Path) -> None:
        self.loop = Loop()
        self.page = Page(tmp_path / "connections")
        self.page.take_row()
        self.failures: list[tuple[str, str]] = []
        self.recoveries: list[str] = []
        self.log_path = tmp_path / "log"
        self._log_fd = os.open(self.log_path, os.O_WRONLY | os.O_CREAT)
        self.log = AccessLog(self._log_fd)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self.listener.setblocking(False)
        self.engine: Engine
        self.revision = 0
        self.clients: list[socket.socket] = []
        self.backends: list[Backend] = []

    def failed(self, identity: str, reason: str) -> None:
        self.failures.append((identity, reason))

    def recovered(self, identity: str) -> None:
        self.recoveries.append(identity)

    def table(self, *endpoints: Endpoint, **route: Any) -> Table:
        self.revision += 1
        route = {"shares": {"main": 100}, "pools": {"main": endpoints}} | route
        made = Route(service="shop", **route)
        return Table(generation=1, revision=self.revision, routes={"shop": made})

    def serve(self, *endpoints: Endpoint, **route: Any) -> None:
        """Begin, or take a new table."""
        table = self.table(*endpoints, **route)
        if self.revision == 1:
            self.engine = Engine(self.loop, self.page, table, self, self.log)
            self.acceptor = Acceptor(
                self.listener, self.loop, lambda client, peer: self.engine.let_in("shop", client, peer)
            )
            self.acceptor.open()
        else:
            self.engine.take(table)

    def backend(self, path: str | None = None) -> Backend:
        self.backends.append(Backend(path))
        return self.backends[-1]

    def client(self, data: bytes = b"") -> socket.socket:
        made = socket.create_connection(self.listener.getsockname(), DEADLINE_SECONDS)
        made.setblocking(False)
        if data:
            made.send(data)
        self.clients.append(made)
        return made

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, what
            self.loop.turn(0.005)

    def read(self, sock: socket.socket, size: int = 1) -> bytes:
        """At least so many bytes, fewer at an end; b"reset" in place of an end by a reset."""
        data = bytearray()

        def has_it() -> bool:
            try:
                part = sock.recv(65536)
            except BlockingIOError:
                return False
            except ConnectionResetError:
                data.extend(b"reset")
                return True
            data.extend(part)
            return not part or len(data) >= size

        self.until(has_it, f"{size} bytes")
        return bytes(data)

    def lines(self) -> list[dict[str, Any]]:
        self.log.flush()
        return [json.loads(line) for line in self.log_path.read_text().splitlines()]

    def close(self) -> None:
        self.acceptor.close()
        self.engine.close_some(10_000)
        self.loop.turn(0)
        assert self.engine.connections == self.engine.waiting == 0
        assert self.page.current(0) == 0
        assert self.loop.is_idle
        self.loop.shut_down()
        for one in (*self.clients, *self.backends, self.listener):
            one.close()
        os.close(self._log_fd)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def endpoint(backend: Backend | str, name: str = "a", **values: Any) -> Endpoint:
    address = backend if isinstance(backend, str) else backend.address
    return Endpoint(identity=f"shop/main/{name}@{address}#0", name=name, address=address, **values)


def nobody_there() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


# --- relaying -------------------------------------------------------------------------------------------------------


def test_a_connection_is_relayed_counted_and_logged(rig: Rig) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend))
    client = rig.client(b"question")
    rig.until(backend.look, "the backend has it")
    assert rig.read(backend.accepted[0], 8) == b"question"
    backend.accepted[0].send(b"answer")
    assert rig.read(client, 6) == b"answer"
    assert rig.engine.connections == rig.page.current(0) == 1
    client.close()
    backend.accepted[0].close()
    rig.until(lambda: rig.engine.connections == 0, "it has ended")
    sums = rig.page.sums(endpoint(backend).identity)
    assert [sums[field] for field in (CURRENT, TOTAL, SENT_BYTES, RECEIVED_BYTES, RESET)] == [0, 1, 8, 6, 0]
    (line,) = rig.lines()
    assert (line["service"], line["backend"], line["end"]) == ("shop", "a", "--")
    assert (line["sent_bytes"], line["received_bytes"]) == (8, 6)


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a server was to hear something first, for each connection that was begun."""
    found: list[bool] = []
    begin = connecting.begin

    def noted(target: Target, silent_seconds: float | None, speaks: bool) -> tuple[socket.socket | None, int]:
        found.append(speaks)
        return begin(target, silent_seconds, speaks)

    monkeypatch.setattr(connecting, "begin", noted)
    return found


def exchange(rig: Rig, backend: Backend, is_server_first: bool) -> None:
    number = len(backend.accepted)
    client = rig.client(b"" if is_server_first else b"question")
    rig.until(lambda: backend.look() > number, "the backend has it")
    if not is_server_first:
        assert rig.read(backend.accepted[number], 8) == b"question"
    backend.accepted[number].send(b"answer")
    assert rig.read(client, 6) == b"answer"
    client.close()
    backend.accepted[number].close()


def test_a_server_whose_clients_all_speak_first_hears_the_handshakes_end_with_what_they_say(
    rig: Rig, spoken: list[bool]
) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend))
    for _ in range(CLIENTS_FIRST + 1):
        exchange(rig, backend, is_server_first=False)
    assert spoken == [False] * CLIENTS_FIRST + [True]
    exchange(rig, backend, is_server_first=True)  # after all: it is only later that it hears of its client
    exchange(rig, backend, is_server_first=False)
    assert spoken[-2:] == [True, False]


@pytest.mark.parametrize("is_server_first", [True, False])
def test_a_server_that_is_told_the_clients_address_always_hears_something_first(
    rig: Rig, spoken: list[bool], is_server_first: bool
) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend), send_proxy="v2")
    rig.client(b"" if is_server_first else b"question")
    rig.until(backend.look, "the backend has it")
    assert rig.read(backend.accepted[0], 16).startswith(b"\r\n\r\n\0\r\nQUIT\n")
    assert spoken == [True]


def test_a_server_that_closes_at_once_says_nothing_of_who_speaks_first(rig: Rig) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend))
    client = rig.client()
    rig.until(backend.look, "the backend has it")
    reset(backend.accepted[0])
    assert rig.read(client) == b"reset"
    assert rig.engine._services["shop"].clients_first == 0


def test_a_backend_on_a_unix_socket(rig: Rig, tmp_path: Path) -> None:
    backend = rig.backend(str(tmp_path / "backend.sock"))
    rig.serve(endpoint(backend))
    rig.client(b"x")
    rig.until(backend.look, "the backend has it")
    assert rig.read(backend.accepted[0]) == b"x"


def test_another_backend_is_tried_and_the_failure_told_once_more_when_it_is_over(rig: Rig) -> None:
    bad, backend = nobody_there(), rig.backend()
    rig.serve(endpoint(bad, "bad"), endpoint(backend, "good"))
    for number in range(4):
        rig.client(b"x")
        rig.until(lambda wanted=number + 1: backend.look() == wanted, "it is relayed")  # type: ignore[misc]
    identity = endpoint(bad, "bad").identity
    assert rig.failures
    assert set(rig.failures) == {(identity, "connection refused")}
    assert rig.page.sums(identity)[FAILED] == len(rig.failures)
    assert rig.recoveries == []
    listener = socket.create_server(("127.0.0.1", int(bad.rpartition(":")[2])))
    rig.client()
    rig.client()
    rig.until(lambda: rig.recoveries, "it is told")
    assert rig.recoveries == [identity]
    listener.close()


def test_when_all_refuse_the_client_is_reset_at_once(rig: Rig) -> None:
    rig.serve(endpoint(nobody_there(), "a"), endpoint(nobody_there(), "b"))
    assert rig.read(rig.client()) == b"reset"
    assert len(rig.failures) == 2
    (line,) = rig.lines()
    assert (line["end"], line["reason"]) == ("SC", "connection refused")
    assert rig.failures[-1][0].startswith(f"shop/main/{line['backend']}@"), "the last one"


def test_when_none_is_eligible_the_client_is_reset_at_once(rig: Rig) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend, is_eligible=False))
    assert rig.read(rig.client()) == b"reset"
    assert backend.look() == 0


def test_backups_serve_only_while_no_other_may(rig: Rig) -> None:
    main, backup = rig.backend(), rig.backend()
    both = [endpoint(main, "main"), endpoint(backup, "backup", backup=True)]
    rig.serve(*both)
    for _ in range(3):
        rig.client()
    rig.until(lambda: rig.engine.connections == 3, "they are relayed")
    assert (main.look(), backup.look()) == (3, 0)
    rig.serve(endpoint(main, "main", is_eligible=False), both[1])
    rig.client()
    rig.until(lambda: backup.look() == 1, "the backup")


def test_a_backup_serves_who_could_not_be_connected_elsewhere(rig: Rig) -> None:
    backup = rig.backend()
    rig.serve(endpoint(nobody_there(), "main"), endpoint(backup, "backup", backup=True))
    rig.client()
    rig.until(backup.look, "the backup")


def test_nothing_keeps_a_connection_that_has_ended(rig: Rig) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend))
    client = rig.client(b"question")
    rig.until(lambda: backend.look() and rig.engine.connections, "it is relayed")
    before = alive(Relay)
    assert before >= 1
    client.close()
    backend.accepted[0].close()
    rig.until(lambda: rig.engine.connections == 0, "it has ended")
    rig.loop.turn(0)
    assert alive(Relay) == before - 1


def alive(kind: type) -> int:
    return sum(isinstance(one, kind) for one in gc.get_objects())


# --- waiting --------------------------------------------------------------------------------------------------------


def test_beyond_maxconn_clients_wait_in_order_until_a_place_is_free(rig: Rig) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend, maxconn=1))
    clients = [rig.client(b"%d" % number) for number in range(3)]
    rig.until(lambda: backend.look() and rig.engine.waiting == 2, "one is relayed, two wait")
    for number, client in enumerate(clients):
        rig.until(lambda wanted=number + 1: backend.look() == wanted, "its turn")  # type: ignore[misc]
        assert rig.read(backend.accepted[number]) == b"%d" % number
        assert rig.page.current(0) == 1
        client.close()
        backend.accepted[number].close()


def test_what_was_told_of_a_client_before_it_had_a_backend_says_nothing_of_urgent_bytes(rig: Rig) -> None:
    """The event of its end comes in the turn in which the relay is made."""
    backend = rig.backend()
    rig.serve(endpoint(backend, maxconn=1))
    for target in rig.engine._targets:
        target.is_local = False  # so that connecting takes a turn
    first = rig.client()
    rig.until(lambda: rig.engine.connections == 1 and backend.look(), "one has the only place")
    client = rig.client()
    rig.until(lambda: rig.engine.waiting == 1, "the other waits")
    first.close()
    backend.accepted[0].close()
    rig.until(lambda: rig.engine.attempts[0].target is not None, "it is being connected")
    client.send(b"before")
    client.send(b"U", socket.MSG_OOB)
    client.send(b"after")
    client.shutdown(socket.SHUT_WR)
    rig.until(lambda: backend.look() == 2, "it is connected")
    backend.accepted[1].setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    seen = b""
    while data := rig.read(backend.accepted[1]):
        seen += data
    assert seen == b"beforeUafter"


def test_a_place_that_another_relay_worker_gives_back_is_found(rig: Rig, tmp_path: Path) -> None:
    backend = rig.backend()
    other = Page(tmp_path / "connections")
    other.take_row()
    cells = other.cells(other.column(endpoint(backend).identity))
    cells[CURRENT] = 1
    rig.serve(endpoint(backend, maxconn=1))
    rig.client()
    rig.until(lambda: rig.engine.waiting, "it waits")
    cells[CURRENT] = 0
    rig.until(backend.look, "it is relayed")
    cells.release()
    other.close()


def test_who_waits_too_long_or_finds_the_queue_full_is_reset(rig: Rig) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend, maxconn=1), maximum_queue=1, timeouts=Timeouts(queue_seconds=0.05))
    rig.client()
    rig.until(backend.look, "one is relayed")
    waiting = rig.client()
    rig.until(lambda: rig.engine.waiting, "one waits")
    assert rig.read(rig.client()) == b"reset"
    assert rig.read(waiting) == b"reset"
    assert rig.lines()[-1]["seconds"] >= 0.05, "as long as it waited"
    assert {(line["end"], line["reason"]) for line in rig.lines()} == {
        ("PQ", "the queue is full"),
        ("sQ", "no place in time"),
    }


@pytest.mark.parametrize("how", ["fin", "reset"])
def test_a_client_that_leaves_the_queue_gives_up_its_place(rig: Rig, how: str) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend, maxconn=1))
    rig.client()
    rig.until(backend.look, "one is relayed")
    leaving = rig.client()
    rig.until(lambda: rig.engine.waiting, "one waits")
    reset(leaving) if how == "reset" else leaving.close()
    rig.until(lambda: not rig.engine.waiting, "it has left")
    assert [line["end"] for line in rig.lines()] == ["CQ"]


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_client_that_has_asked_and_resets_gives_up_its_place_too(rig: Rig, has_ended: bool) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend, maxconn=1))
    rig.client()
    rig.until(backend.look, "one is relayed")
    leaving = rig.client(b"question")
    rig.until(lambda: rig.engine.waiting, "one waits")
    if has_ended:
        leaving.shutdown(socket.SHUT_WR)
        rig.until(lambda: rig.loop.turn(0.005), "that is known")
    reset(leaving)
    rig.until(lambda: not rig.engine.waiting, "it has left")
    assert backend.look() == 1


def test_a_client_that_has_asked_and_ended_its_half_keeps_its_place(rig: Rig) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend, maxconn=1))
    first = rig.client()
    rig.until(backend.look, "one is relayed")
    half = rig.client(b"question")
    half.shutdown(socket.SHUT_WR)
    rig.until(lambda: rig.engine.waiting, "one waits")
    first.close()
    backend.accepted[0].close()
    rig.until(lambda: backend.look() == 2, "its turn")
    assert rig.read(backend.accepted[1], 100) == b"question"
    backend.accepted[1].send(b"answer")
    assert rig.read(half, 6) == b"answer"


def test_clients_wait_for_a_first_check(rig: Rig) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend, is_eligible=False, is_awaited=True))
    rig.client()
    rig.until(lambda: rig.engine.waiting, "it waits")
    rig.serve(endpoint(backend))
    rig.until(backend.look, "it is relayed")


def test_more_than_so_many_of_one_source_are_reset(rig: Rig) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend), per_source=2)
    first = [rig.client(), rig.client()][0]
    rig.until(lambda: backend.look() == 2, "two are relayed")
    assert rig.read(rig.client()) == b"reset"
    first.close()
    backend.accepted[0].close()
    rig.until(lambda: rig.engine.connections == 1, "one has ended")
    rig.client()
    rig.until(lambda: backend.look() == 3, "another one is let in")


# --- limits ---------------------------------------------------------------------------------------------------------


def test_a_backend_that_does_not_answer_the_connect_is_given_up_after_the_time(rig: Rig) -> None:
    backend = rig.backend()
    full = socket.socket()  # a queue of one that is full: SYNs are dropped
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    address = full.getsockname()
    fillers = [socket.socket() for _ in range(3)]
    for filler in fillers:
        filler.setblocking(False)
        assert filler.connect_ex(address) in (0, errno.EINPROGRESS)
    silent = endpoint(f"127.0.0.1:{address[1]}", "silent")
    rig.serve(silent, endpoint(backend, "good", backup=True), timeouts=Timeouts(connect_seconds=0.05))
    rig.serve(silent, endpoint(backend, "good"), timeouts=Timeouts(connect_seconds=0.05))
    for number in range(2):
        rig.client()
        rig.until(lambda wanted=number + 1: backend.look() == wanted, "relayed to the other")  # type: ignore[misc]
    assert set(rig.failures) == {(silent.identity, "connection timed out")}
    for one in (full, *fillers):
        one.close()


def test_a_connect_timeout_is_told_from_a_refusal(rig: Rig) -> None:
    with Full() as full:
        timeouts = Timeouts(connect_seconds=0.05)
        rig.serve(endpoint(full.address, "silent"), timeouts=timeouts)
        assert rig.read(rig.client()) == b"reset"
        rig.serve(endpoint(nobody_there(), "refusing"), timeouts=timeouts)
        assert rig.read(rig.client()) == b"reset"
        rig.serve(endpoint(full.address, "silent", is_eligible=False), timeouts=timeouts)
        assert rig.read(rig.client()) == b"reset"
    late, refused, nobody = rig.lines()
    assert (late["end"], late["reason"], late["backend"]) == ("sC", "connection timed out", "silent")
    assert late["seconds"] >= 0.05, "as long as it took"
    assert (refused["end"], refused["reason"], refused["backend"]) == ("SC", "connection refused", "refusing")
    assert (nobody["end"], nobody["reason"], nobody["backend"]) == ("SQ", "no backend", None)


def test_who_leaves_while_it_is_connected_is_logged_with_the_backend(rig: Rig) -> None:
    with Full() as full:
        rig.serve(endpoint(full.address, "silent"))
        client = rig.client()
        rig.until(lambda: rig.engine.waiting, "it is being connected")
        client.close()
        rig.until(lambda: not rig.engine.waiting, "it has left")
    (line,) = rig.lines()
    assert (line["end"], line["backend"]) == ("CC", "silent")


def test_a_server_that_says_nothing_in_time_is_cut_off(rig: Rig) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend), timeouts=Timeouts(first_byte_seconds=0.05))
    client = rig.client(b"question")
    rig.until(backend.look, "it is relayed")
    assert rig.read(client) == b"reset"
    assert [line["end"] for line in rig.lines()] == ["sD"]


def test_no_fds_left_is_a_pause_and_no_spin(rig: Rig) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    waiting = [rig.client() for _ in range(3)]
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        rig.until(lambda: rig.acceptor.pauses, "it pauses")
        assert rig.loop.turn(0) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    rig.until(lambda: backend.look() == len(waiting), "all are let in")


# --- PROXY ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_clients_address_goes_ahead_in_a_header(rig: Rig, version: str) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend), send_proxy=version)
    client = rig.client(b"question")
    rig.until(backend.look, "it is relayed")
    encode = encode_v1 if version == "v1" else encode_v2
    header = encode(client.getsockname(), rig.listener.getsockname())
    assert rig.read(backend.accepted[0], len(header) + 8) == header + b"question"


@pytest.mark.parametrize("parts", [1, 3])
def test_the_address_in_a_header_is_passed_on(rig: Rig, parts: int) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend), accept_proxy="require", send_proxy="v1")
    header = encode_v2(("192.0.2.7", 1234), ("192.0.2.8", 80))
    client = rig.client()
    size = len(header) // parts
    for begin in range(0, len(header), size):
        client.send(header[begin : begin + size])
        rig.loop.turn(0.01)
    client.send(b"question")
    rig.until(backend.look, "it is relayed")
    expected = b"PROXY TCP4 192.0.2.7 192.0.2.8 1234 80\r\nquestion"
    assert rig.read(backend.accepted[0], len(expected)) == expected


@pytest.mark.parametrize(("mode", "seen"), [("require", b""), ("accept", b"GET / HTTP/1.1\r\n")])
def test_without_a_header_a_client_is_reset_or_let_in(rig: Rig, mode: str, seen: bytes) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend), accept_proxy=mode)
    client = rig.client(b"GET / HTTP/1.1\r\n")
    if seen:
        rig.until(backend.look, "it is relayed")
        assert rig.read(backend.accepted[0], len(seen)) == seen
    else:
        assert rig.read(client) == b"reset"
        assert [line["end"] for line in rig.lines()] == ["PR"]


def test_the_log_says_how_long_a_header_was_waited_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lb.relay.attempt.HEADER_SECONDS", 0.05)
    rig.serve(endpoint(rig.backend()), accept_proxy="require")
    assert rig.read(rig.client()) == b"reset"
    (line,) = rig.lines()
    assert (line["end"], line["backend"]) == ("cR", None)
    assert line["seconds"] >= 0.05


def test_who_is_not_trusted_needs_not_try_a_header(rig: Rig) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend), accept_proxy="require", proxy_from=("192.0.2.0/24",))
    assert rig.read(rig.client(encode_v1(("192.0.2.7", 1), ("192.0.2.8", 80)))) == b"reset"
    assert backend.look() == 0


@pytest.mark.parametrize("mode", ["require", "accept"])
def test_who_is_gone_before_it_is_accepted_hurts_nobody_else(rig: Rig, mode: str) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend), accept_proxy=mode)
    reset(rig.client(b"x"))  # getpeername(2) knows nothing of it any more
    other = rig.client(encode_v1(("192.0.2.7", 1234), ("192.0.2.8", 80)) + b"question")
    rig.until(lambda: backend.look() and rig.engine.waiting == 0, "the other one is relayed")
    assert rig.read(backend.accepted[-1], 8) == b"question"
    backend.accepted[-1].send(b"answer")
    assert rig.read(other, 6) == b"answer"


# --- tables ---------------------------------------------------------------------------------------------------------


def test_a_switch_reaches_attempts_that_are_under_way(rig: Rig) -> None:
    full = socket.socket()
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    fillers = [socket.socket() for _ in range(3)]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(full.getsockname())
    green = rig.backend()
    pools = {"blue": (endpoint(f"127.0.0.1:{full.getsockname()[1]}", "b"),), "green": (endpoint(green, "g"),)}
    rig.serve(pools=pools, shares={"blue": 100})
    client = rig.client(b"question")
    rig.until(lambda: rig.engine.waiting, "it tries blue")
    rig.serve(pools=pools, shares={"green": 100})
    rig.until(green.look, "it went to green")
    assert rig.read(green.accepted[0], 8) == b"question"
    assert client.fileno() >= 0
    for one in (full, *fillers):
        one.close()


def test_connections_of_what_left_the_table_go_on(rig: Rig) -> None:
    old, new = rig.backend(), rig.backend()
    rig.serve(endpoint(old, "old"))
    client = rig.client(b"x")
    rig.until(lambda: old.look() and rig.engine.connections, "it is relayed")
    rig.serve(endpoint(new, "new"))
    rig.client()
    rig.until(new.look, "new ones go elsewhere")
    assert rig.read(old.accepted[0]) == b"x"
    old.accepted[0].send(b"y")
    assert rig.read(client) == b"y"


def test_percentages_split_new_connections(rig: Rig) -> None:
    blue, green = rig.backend(), rig.backend()
    rig.serve(
        pools={"blue": (endpoint(blue, "b"),), "green": (endpoint(green, "g"),)}, shares={"green": 25, "blue": 75}
    )
    for number in range(200):
        rig.client()
        rig.until(lambda wanted=number + 1: blue.look() + green.look() == wanted, "relayed")  # type: ignore[misc]
    assert 20 < green.look() < 85  # 6 standard deviations around 50


def test_connections_are_closed_in_the_time_that_the_table_says(rig: Rig) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend))
    clients = [rig.client() for _ in range(20)]
    rig.until(lambda: backend.look() == rig.engine.connections == 20, "all are relayed")
    slowly = Closing(at=time.monotonic(), spread_seconds=600.0)
    rig.serve(endpoint(backend, is_eligible=False, closing=slowly))
    rig.until(lambda: rig.engine.connections < 20, "the first is closed")
    fired: list[bool] = []
    rig.loop.timers.call_at(time.monotonic() + 0.3, lambda: fired.append(True))
    rig.until(lambda: fired, "some ticks later")
    assert rig.engine.connections == 19, "each has its turn within the ten minutes"
    at_once = Closing(at=time.monotonic())
    rig.serve(endpoint(backend, is_eligible=False, closing=at_once))
    rig.until(lambda: rig.engine.connections == 0, "all are closed")
    assert [rig.read(client) for client in clients] == [b"reset"] * 20
    assert {line["end"] for line in rig.lines()} == {"KD"}


def test_a_closing_that_is_taken_back_closes_nobody(rig: Rig) -> None:
    backend = rig.backend()
    rig.serve(endpoint(backend))
    rig.client()
    rig.until(lambda: backend.look() and rig.engine.connections, "it is relayed")
    rig.serve(endpoint(backend, closing=Closing(at=time.monotonic() + 0.05)))
    rig.serve(endpoint(backend))
    fired: list[bool] = []
    rig.loop.timers.call_at(time.monotonic() + 0.1, lambda: fired.append(True))
    rig.until(lambda: fired, "the time is over")
    assert rig.engine.connections == 1


def test_slow_start_gives_a_backend_that_came_back_less_at_first(rig: Rig) -> None:
    warm, cold = rig.backend(), rig.backend()
    now = time.monotonic()
    rig.serve(endpoint(warm, "w"), endpoint(cold, "c", up_since=now), slow_start_seconds=10_000.0)
    for number in range(44):
        rig.client()
        rig.until(lambda wanted=number + 1: warm.look() + cold.look() == wanted, "relayed")  # type: ignore[misc]
    assert (warm.look(), cold.look()) == (40, 4)  # a tenth of the weight


def test_an_interface_that_is_not_there_is_one_backend_less_until_it_is(rig: Rig, tmp_path: Path) -> None:
    backend, scoped = rig.backend(), "[fe80::1%none0]:80"
    rig.serve(endpoint(scoped, "b"), endpoint(backend))
    for number in range(1, 4):
        rig.client()
        rig.until(lambda wanted=number: backend.look() == wanted, "the other one has it")  # type: ignore[misc]
    rig.serve(endpoint(scoped, "b"))
    assert rig.read(rig.client()) == b"reset"


@pytest.mark.parametrize(
    ("address", "is_local"), [("127.0.0.2:80", True), ("[::1]:80", True), ("192.0.2.1:80", False), ("unix:/x", False)]
)
def test_whether_a_backend_is_on_this_machine(rig: Rig, address: str, is_local: bool) -> None:
    rig.serve(endpoint(address))
    [target] = rig.engine._targets
    assert target.is_local == is_local
