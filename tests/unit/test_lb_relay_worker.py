"""The drain of a relay worker, against a master that the test plays."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from handoff import Worker
from lb.core.model import Balancer
from lb.core.table import Endpoint, Route, Table
from lb.page import Page
from lb.relay import worker as worker_module
from lb.relay.worker import RelayWorker
from tests.unit.test_lb_engine import Backend

SOON_SECONDS = 0.05


class Played:
    """Plays a `handoff.Worker` that drains from the start."""

    generation, slot = 1, 0
    is_orphan = can_hand_over = may_adopt = has_unread = has_siblings = is_crowded = False
    connections = 0
    ending_listeners: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self._fd = os.eventfd(1)
        self.drain_seconds: float | None = 1000.0
        self.said: list[str] = []
        self.surplus: Callable[[], int] = lambda: 0

    def fileno(self) -> int:
        return self._fd

    def wait(self, _timeout: float) -> bool:
        os.eventfd_read(self._fd)
        return True

    def closed(self) -> None:
        self.said.append("closed")

    def adopted_fds(self) -> list[tuple[list[int], bytes]]:
        return []

    def close(self) -> None:
        os.close(self._fd)


class Rig:
    """A relay worker with one backend, and one listener that clients wait on before it serves."""

    def __init__(self, directory: Path) -> None:
        self.played, self.backend = Played(), Backend()
        assert {name for name in dir(Played) if not name.startswith("_")} - {"close"} <= {
            *dir(Worker),
            *("generation", "slot", "said"),
        }
        one = Endpoint(identity="shop/main/a@1#0", name="a", address=self.backend.address)
        route = Route(service="shop", shares={"main": 100}, pools={"main": (one,)})
        table = Table(generation=1, revision=1, routes={"shop": route})
        self.page = Page(directory / "connections")
        self.page.take_row()
        played: Any = self.played
        self.worker = RelayWorker(played, self.page, lambda: table, directory, Balancer(name="edge", services=()))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.address = self.listener.getsockname()
        self.clients: list[socket.socket] = []

    def client(self) -> None:
        self.clients.append(socket.create_connection(self.address, 10))

    def soon(self, *steps: Callable[[], None]) -> None:
        """Have these done while it drains, one after another."""
        for number, step in enumerate(steps, 1):
            self.worker._loop.timers.call_at(time.monotonic() + number * SOON_SECONDS, step)

    def drain(self) -> None:
        self.worker.serve({"shop.0": self.listener})

    def is_over(self) -> None:
        self.played.drain_seconds = 0.0

    def close(self) -> None:
        self.page.close()
        for one in (*self.clients, self.listener, self.backend, self.played):
            one.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


def test_near_the_deadline_few_connections_are_closed_over_the_whole_window(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "SPREAD_SECONDS", 500.0)
    rig.played.ending_listeners = frozenset({"shop.0"})
    for _ in range(12):
        rig.client()
    left: list[int] = []

    def begin() -> None:
        left.append(rig.worker.engine.connections)
        rig.played.drain_seconds = 400.0

    def look() -> None:
        left.append(rig.worker.engine.connections)

    rig.soon(begin, look, look, look, look, rig.is_over)
    rig.drain()
    assert left == [12, 11, 11, 11, 11], "the next is due after half a minute"
    assert rig.worker.engine.connections == 0


def test_an_orphan_lets_in_who_is_queued_and_closes_its_listeners_at_once(rig: Rig) -> None:
    rig.played.is_orphan = True
    rig.client()
    seen: list[bool] = []

    def look() -> None:
        with socket.socket() as late:
            seen.append(late.connect_ex(rig.address) != 0)
        assert rig.backend.look() == rig.worker.engine.connections == 1

    rig.soon(look, rig.is_over)
    rig.drain()
    assert rig.listener.fileno() == -1
    assert seen == [True], "the address is free while the connection goes on"


def test_a_worker_that_drains_already_closes_its_listeners_when_the_master_dies(rig: Rig) -> None:
    rig.played.ending_listeners = frozenset({"shop.0"})
    rig.client()
    seen: list[int] = []

    def die() -> None:
        seen.append(rig.listener.fileno())
        rig.played.is_orphan = True
        os.eventfd_write(rig.played.fileno(), 1)

    rig.soon(die, lambda: seen.append(rig.listener.fileno()), rig.is_over)
    rig.drain()
    assert seen[0] >= 0
    assert seen[1] == -1


def test_a_drain_that_was_heard_of_without_a_wake_up_is_noticed_in_the_same_turn(rig: Rig) -> None:
    """`surplus` reads what the master says, too; then nothing is there that makes anybody readable."""
    rig.played.drain_seconds = None

    rig.played.has_siblings = True
    asked = 0

    def surplus() -> int:
        nonlocal asked
        asked += 1
        assert not rig.played.said
        if asked == 2:
            rig.played.drain_seconds = 1000.0
        return 0

    rig.played.surplus = surplus
    rig.drain()
    assert (asked, rig.played.said) == (2, ["closed"])
