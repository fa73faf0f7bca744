"""Connections move from one engine to another: counts, limits, the queue, and what no table has any more."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from handoff import Worker
from handoff.core.proxy_protocol import encode_v2
from lb.core.model import Timeouts
from lb.core.table import Table
from lb.page import CURRENT
from lb.relay.letters import AttemptLetter, BadLetter, RelayLetter, decode, encode
from lb.relay.moving import Moving
from tests.unit.test_lb_engine import Backend, Full, Rig, endpoint


class Post:
    """Plays a `handoff.Worker` and its mailbox: letters with real fds."""

    def __init__(self) -> None:
        self.letters: list[tuple[list[int], bytes]] = []
        self.room = 1000
        self.drain_seconds: float | None = 30.0
        self.can_hand_over = True
        self.has_unread = self.has_siblings = self.is_crowded = False
        self.connections = 0
        self.above = 0

    def hand_over(self, fds: tuple[int, ...], state: bytes) -> bool:
        if not self.room:
            return False
        self.room -= 1
        self.letters.append(([os.dup(fd) for fd in fds], state))
        return True

    def adopted_fds(self) -> list[tuple[list[int], bytes]]:
        found, self.letters = self.letters, []
        return found

    def surplus(self) -> int:
        return self.above


class Two:
    """An old relay worker and a new one, with one page."""

    def __init__(self, tmp_path: Path) -> None:
        (tmp_path / "old").mkdir()
        (tmp_path / "new").mkdir()
        self.old = Rig(tmp_path / "old")
        (tmp_path / "new" / "connections").hardlink_to(tmp_path / "old" / "connections")
        self.new = Rig(tmp_path / "new")
        self.post = Post()
        self._moving: dict[Rig, Moving] = {}
        self.service: str | None = None
        """Whose listener clients came by."""

    def serve(self, *endpoints: Any, **route: Any) -> None:
        self.old.serve(*endpoints, **route)
        self.new.serve(*endpoints, **route)

    def moving(self, rig: Rig) -> Moving:
        worker: Any = self.post
        played = {"hand_over", "adopted_fds", "surplus", "drain_seconds", "can_hand_over", "has_unread"}
        assert {*played, "has_siblings", "is_crowded"} <= set(dir(Worker))
        if rig not in self._moving:
            self._moving[rig] = Moving(worker, rig.engine, rig.loop, lambda _: self.service)
        return self._moving[rig]

    def move(self) -> None:
        moving = self.moving(self.old)
        assert not moving.hand_over_some(())
        self.moving(self.new).adopt_some()
        assert not moving.hand_over_some(())
        assert moving.is_settled
        assert (self.old.engine.connections, self.old.engine.waiting) == (0, 0)
        self.old.loop.turn(0)

    def relayed(self, backend: Backend, count: int = 1) -> None:
        """By the old one."""
        self.both(lambda: backend.look() == self.old.engine.connections == count, "relayed")

    def received(self, sock: socket.socket, data: bytes) -> None:
        def has_it() -> bool:
            try:
                return sock.recv(len(data), socket.MSG_PEEK) == data
            except BlockingIOError:
                return False

        self.both(has_it, f"{data!r}")
        sock.recv(len(data))

    def both(self, condition: Any, what: str) -> None:
        def turned() -> Any:
            self.old.loop.turn(0)
            return condition()

        self.new.until(turned, what)


def hang_up(*ends: socket.socket) -> None:
    for end in ends:
        end.close()


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    made = Two(tmp_path)
    yield made
    for rig in (made.old, made.new):
        rig.engine.close_some(1000)
    assert not made.moving(made.old).hand_over_some(())
    made.new.close()
    made.old.close()


def test_a_relayed_connection_goes_on_and_is_counted_once(two: Two) -> None:
    backend = two.new.backend()
    two.serve(endpoint(backend, maxconn=5), per_source=5)
    client = two.old.client(b"one")
    two.relayed(backend)
    two.received(backend.accepted[0], b"one")
    [target] = two.new.engine._targets
    assert target.connections == 1
    two.move()
    client.send(b"two")
    assert two.new.read(backend.accepted[0], 3) == b"two"
    backend.accepted[0].send(b"answer")
    assert two.new.read(client, 6) == b"answer"
    assert two.new.engine.connections == target.cells[CURRENT] == 1
    assert two.new.engine._services["shop"].dispatcher.sources == {"127.0.0.1": 1}
    assert not two.old.engine._services["shop"].dispatcher.sources
    hang_up(client, backend.accepted[0])
    two.new.until(lambda: two.new.engine.connections == 0, "it has ended")
    assert target.cells[CURRENT] == 0
    assert not two.new.engine._services["shop"].dispatcher.sources
    [line] = two.new.lines()
    assert (line["sent_bytes"], line["received_bytes"], line["client"]) == (6, 6, line["client"])
    assert two.old.lines() == []


def test_a_place_at_a_backend_is_kept_until_the_other_counts_it(two: Two) -> None:
    backend = two.new.backend()
    two.serve(endpoint(backend, maxconn=1))
    two.old.client()
    two.relayed(backend)
    moving = two.moving(two.old)
    two.post.has_unread = True
    assert not moving.hand_over_some(())
    [target] = two.old.engine._targets
    assert (two.old.engine.connections, target.cells[CURRENT], moving.is_settled) == (0, 1, False)
    two.moving(two.new).adopt_some()
    two.post.has_unread = False
    assert not moving.hand_over_some(())
    assert (target.cells[CURRENT], target.connections, moving.is_settled) == (0, 1, True)


def test_without_room_they_stay_and_go_on(two: Two) -> None:
    backend = two.new.backend()
    two.serve(endpoint(backend))
    clients = [two.old.client(b"x") for _ in range(3)]
    two.relayed(backend, 3)
    two.post.room = 1
    assert not two.moving(two.old).hand_over_some(())
    two.moving(two.new).adopt_some()
    assert (two.old.engine.connections, two.new.engine.connections) == (2, 1)
    for client in clients:
        client.send(b"y")
    for one in backend.accepted:
        two.received(one, b"xy")


def test_a_client_in_the_queue_moves_and_keeps_its_deadline(two: Two) -> None:
    backend = two.new.backend()
    two.serve(endpoint(backend, maxconn=1), timeouts=Timeouts(queue_seconds=1000.0), maximum_queue=1)
    first = two.old.client()
    two.relayed(backend)
    second = two.old.client(b"question")
    two.both(lambda: two.old.engine.waiting == 1, "one waits")
    [attempt] = two.old.engine.attempts
    due_at = attempt.due_at
    two.move()
    [moved] = two.new.engine.attempts
    assert moved.due_at == pytest.approx(due_at)
    assert two.new.engine.waiting == 1
    hang_up(first, backend.accepted[0])
    two.new.until(lambda: backend.look() == 2, "it has its place")
    assert two.new.read(backend.accepted[1], 8) == b"question"
    second.send(b"!")
    assert two.new.read(backend.accepted[1]) == b"!"


def test_a_client_that_is_just_being_connected_moves_and_is_connected_anew(two: Two) -> None:
    backend = two.new.backend()
    with Full() as full:
        slow = endpoint(full.address, "slow", maxconn=1)
        two.old.serve(slow, timeouts=Timeouts(connect_seconds=1000.0))
        two.new.serve(endpoint(backend, "quick"))
        client = two.old.client(b"question")
        two.both(lambda: any(one.target for one in two.old.engine.attempts), "it is being connected")
        [target] = two.old.engine._targets
        assert target.connections == 1
        two.move()
        assert target.connections == 0
        two.new.until(backend.look, "it is relayed")
        assert two.new.read(backend.accepted[0], 8) == b"question"
        backend.accepted[0].send(b"answer")
        assert two.new.read(client, 6) == b"answer"


@pytest.mark.parametrize("is_there", [True, False])
def test_who_waits_in_a_service_that_is_called_otherwise_by_now_goes_to_it(two: Two, is_there: bool) -> None:
    backend = two.new.backend()
    two.serve(endpoint(backend, maxconn=1))
    two.old.client()
    two.relayed(backend)
    client = two.old.client(b"question")
    two.both(lambda: two.old.engine.waiting == 1, "one waits")
    [attempt] = two.old.engine.attempts
    letter = AttemptLetter(service="former", state=attempt.state())
    two.post.letters = [([os.dup(attempt.client.fileno())], encode(letter))]
    two.old.engine.let_attempt_go(attempt)
    two.service = "shop" if is_there else None
    two.moving(two.new).adopt_some()
    if is_there:
        assert two.new.engine.waiting == 1
    else:
        assert two.new.read(client) == b"reset"


def test_a_letter_of_a_newer_release_is_read(two: Two) -> None:
    backend = two.new.backend()
    two.serve(endpoint(backend))
    two.old.client()
    two.relayed(backend)
    [relay] = two.old.engine.relays()
    letter, _ = two.old.engine.letter(relay)
    said = msgspec.msgpack.decode(encode(letter))
    newer = said | {"mood": "good", "state": said["state"] | {"weather": [1]}}
    assert decode(msgspec.msgpack.encode(newer), 2) == letter


def test_half_a_proxy_header_moves(two: Two) -> None:
    backend = two.new.backend()
    two.serve(endpoint(backend), accept_proxy="require", send_proxy="v1")
    header = encode_v2(("192.0.2.7", 1234), ("192.0.2.8", 80))
    client = two.old.client(header[:20])
    two.both(lambda: any(one._first for one in two.old.engine.attempts), "half of it is read")
    two.move()
    client.send(header[20:] + b"question")
    expected = b"PROXY TCP4 192.0.2.7 192.0.2.8 1234 80\r\nquestion"
    two.new.until(backend.look, "it is relayed")
    assert two.new.read(backend.accepted[0], len(expected)) == expected


def test_what_the_new_table_does_not_have_goes_on(two: Two) -> None:
    backend, other = two.new.backend(), two.new.backend()
    two.old.serve(endpoint(backend, "gone"), timeouts=Timeouts(idle_seconds=77.0))
    two.new.serve(endpoint(other, "new"))
    client = two.old.client()
    two.relayed(backend)
    two.move()
    [moved] = two.new.engine.relays()
    client.send(b"x")
    assert two.new.read(backend.accepted[0]) == b"x"
    assert [one.endpoint.name for one in two.new.engine._targets] == ["new", "gone"]
    letter, _ = two.new.engine.letter(moved)
    assert letter.limits[0] == Timeouts().idle_seconds, "of the new table, where it has the service"
    hang_up(client, backend.accepted[0])
    two.new.until(lambda: two.new.engine.connections == 0, "it has ended")
    assert [one.endpoint.name for one in two.new.engine._targets] == ["new"]


def test_who_has_more_than_its_share_gives(two: Two) -> None:
    backend = two.new.backend()
    two.serve(endpoint(backend))
    two.post.drain_seconds = None
    two.post.above = 2
    for _ in range(5):
        two.old.client()
    two.relayed(backend, 5)
    moving = two.moving(two.old)
    due_at = two.old.loop.timers.next_deadline()
    moving.may_balance()
    assert two.old.loop.timers.next_deadline() == due_at, "who is alone is not woken"
    two.post.has_siblings = True
    moving.may_balance()
    assert (two.post.connections, two.old.engine.connections, len(two.post.letters)) == (5, 3, 2)
    two.moving(two.new).adopt_some()
    assert two.new.engine.connections == 2


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", b"{}"])
def test_what_is_no_letter_is_refused_and_its_fds_are_closed(
    two: Two, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    two.serve()
    with pytest.raises(BadLetter):
        decode(data, 1)
    fds = list(os.pipe())
    two.post.letters = [(list(fds), data)]
    two.moving(two.new).adopt_some()
    assert not any(map(is_open, fds))
    assert "could not be taken over" in caplog.text


def test_a_letter_with_other_fds_than_it_says_is_refused(two: Two, caplog: pytest.LogCaptureFixture) -> None:
    backend = two.new.backend()
    two.serve(endpoint(backend))
    two.old.client()
    two.relayed(backend)
    [relay] = two.old.engine.relays()
    letter, _ = two.old.engine.letter(relay)
    assert isinstance(letter, RelayLetter)
    three, two_pipes = [*os.pipe(), os.dup(0)], list(os.pipe())
    two.post.letters = [(list(three), encode(letter)), (list(two_pipes), encode(letter))]
    two.moving(two.new).adopt_some()
    assert not any(map(is_open, three + two_pipes))
    assert caplog.text.count("could not be taken over") == 2
    assert two.new.engine.connections == 0


@pytest.mark.parametrize("fault", ["address", "no socket"])
def test_a_relay_that_cannot_be_adopted_leaves_no_fd_and_no_count(
    two: Two, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = two.new.backend()
    two.serve(endpoint(backend))
    two.old.client()
    two.relayed(backend)
    [relay] = two.old.engine.relays()
    letter, _ = two.old.engine.letter(relay)
    assert isinstance(letter, RelayLetter)
    if fault == "address":  # of a release that knows other ones
        letter = msgspec.structs.replace(
            letter, identity="shop/main/x@far:9#1", address="far:9:9", counted_as="1.2.3.4"
        )
    ours, theirs = socket.socketpair()
    fds = [ours.detach(), os.dup(theirs.fileno()) if fault == "address" else os.dup(0)]
    two.post.letters = [(list(fds), encode(letter))]
    two.moving(two.new).adopt_some()
    assert not any(map(is_open, fds))
    assert theirs.recv(1) == b"", "nobody holds the other end"
    assert "could not be taken over" in caplog.text
    assert two.new.engine.connections == 0
    assert not two.new.engine._services["shop"].dispatcher.sources
    assert [target.cells[CURRENT] for target in two.new.engine._targets] == [0]
    theirs.close()


def test_a_connection_of_a_service_that_is_gone_goes_on_by_its_old_limits(two: Two) -> None:
    backend = two.new.backend()
    two.old.serve(endpoint(backend), timeouts=Timeouts(idle_seconds=77.0))
    two.new.serve()
    two.new.engine._services.clear()
    client = two.old.client()
    two.relayed(backend)
    two.move()
    client.send(b"x")
    assert two.new.read(backend.accepted[0]) == b"x"
    [moved] = two.new.engine.relays()
    assert moved._limits.idle_seconds == 77.0
    client_of_nobody = two.new.client()
    assert two.new.read(client_of_nobody) == b"reset"
    assert two.new.engine.connections == 1


def test_who_waits_for_a_service_that_is_gone_is_relayed_by_the_old_one_and_moves_then(two: Two) -> None:
    backend = two.new.backend()
    two.old.serve(endpoint(backend, maxconn=1))
    two.new.serve()
    two.new.engine._services.clear()
    first = two.old.client()
    two.relayed(backend)
    second = two.old.client(b"second")
    two.both(lambda: two.old.engine.waiting, "the second one waits")
    two.old.engine.take(Table(generation=2, revision=1, routes={}))
    moving = two.moving(two.old)
    assert not moving.hand_over_some(("shop",))
    two.moving(two.new).adopt_some()
    assert not moving.hand_over_some(("shop",))
    assert (two.old.engine.connections, two.old.engine.waiting, two.new.engine.connections) == (0, 1, 1)
    hang_up(first, backend.accepted[0])
    two.both(lambda: backend.look() == 2 and two.old.engine.connections, "the second one is relayed")
    assert not moving.hand_over_some(("shop",))
    two.moving(two.new).adopt_some()
    assert (two.old.engine.connections, two.new.engine.connections) == (0, 1)
    two.received(backend.accepted[1], b"second")
    hang_up(second, backend.accepted[1])
    two.new.until(lambda: two.new.engine.connections == 0, "it has ended")
