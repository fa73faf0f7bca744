"""Who is told to accept from the sockets of slots that nobody serves."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

from handoff.core.messages import AlsoAccept
from handoff.core.worker import WorkerState
from handoff.counters import FIELDS
from handoff.master.slots import SlotDesk
from handoff.rights import MAXIMUM_FDS

SLOTS = 2 * MAXIMUM_FDS + 10


class Slots:
    def __len__(self) -> int:
        return SLOTS

    def steer(self, slots: Sequence[int]) -> None:
        assert slots == (0,)


class Listener:
    """One socket stands in for that of each slot."""

    name = "web"

    def __init__(self, shared: socket.socket) -> None:
        self.socket, self.slots = shared, Slots()

    def socket_of(self, slot: int) -> socket.socket:
        return self.socket


class Crew:
    """One worker, which takes what it is told as the kernel lets it."""

    def __init__(self) -> None:
        self.told: list[AlsoAccept] = []

    def get(self, worker: int) -> object:
        return SimpleNamespace(worker=worker)

    def counters(self, process: object) -> tuple[int, ...]:
        return (1,) * FIELDS

    def pass_on(self, worker: int, message: AlsoAccept, fds: list[int]) -> bool:
        assert len(fds) == message.fds <= MAXIMUM_FDS, "the kernel refuses more (unix(7), EINVAL)"
        self.told.append(message)
        return True


def test_more_sockets_than_fit_one_message_are_passed_on_in_several() -> None:
    with socket.socket() as shared:
        listener = Listener(shared)
        worker = SimpleNamespace(worker=1, slot=0, generation=1, state=WorkerState.ACCEPTING)
        fleet = SimpleNamespace(workers={1: worker}, generations={1: None})
        crew = Crew()
        generations: Any = {1: SimpleNamespace(listeners={"web": listener})}
        supervisor: Any = SimpleNamespace(fleet=fleet)
        desk = SlotDesk(supervisor, cast("Any", crew), generations, cast("Any", None))
        for now in (1.0, 1.0, 1.0, 1.0):
            desk.check(now)
        assert [message.fds for message in crew.told] == [MAXIMUM_FDS, MAXIMUM_FDS, 9]
        assert {one.slot for one in crew.told[-1].sockets} == set(range(1, SLOTS))
        assert sum(one.is_new for message in crew.told for one in message.sockets) == SLOTS - 1
