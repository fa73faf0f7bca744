"""The mover: what is posted in one turn goes together, nobody is lost, and one that is bad harms nobody else."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from itertools import chain
from typing import Any

import pytest

from handoff.core.messages import ReceiverInfo, Receivers
from handoff.core.moves import HTTP, MAXIMUM_DATA_BYTES, HTTPState
from handoff.counters import CELLS, MOVED, REFUSED, WAITING
from handoff.mailbox import MAXIMUM_INLINE_BYTES, MAXIMUM_LETTERS, mailbox_pair, receive_letters
from handoff.worker.mover import Mover
from tests.unit.fds import open_fds


class Connection:
    """Remembers what it was told."""

    kind = HTTP

    def __init__(self, rig: Rig, number: int, data: bytes = b"") -> None:
        self._rig, self.number, self.data = rig, number, data
        self.told: list[str] = []
        self.is_gone = self.is_broken = False

    def letter(self) -> tuple[HTTPState, bytes, Sequence[int]] | None:
        if self.is_broken:
            raise ValueError("broken")
        if self.is_gone:
            return None
        return HTTPState(client=("192.0.2.1", self.number)), self.data, (self._rig.fd,)

    def waits(self) -> None:
        self.told.append("waits")

    def moved(self) -> None:
        self.told.append("moved")
        self.is_gone = True

    def refused(self) -> None:
        self.told.append("refused")


class Rig:
    """A mover and its receivers."""

    def __init__(self) -> None:
        self.counters = memoryview(bytearray(8 * CELLS)).cast("Q")
        self.mover = Mover(self.counters)
        self.fd, self._other = os.pipe()
        self.readers: list[socket.socket] = []
        self.writers: list[socket.socket] = []

    def receivers(self, number: int) -> None:
        pairs = [mailbox_pair() for _ in range(number)]
        self.writers, self.readers = [writer for writer, _ in pairs], [reader for _, reader in pairs]
        infos = tuple(
            ReceiverInfo(mailbox=1 + place, row=place, adopts=(HTTP,), is_new=True) for place in range(number)
        )
        fds = [os.dup(writer.fileno()) for writer in self.writers]
        self.mover.update(Receivers(receivers=infos, fds=number), fds)

    def post(self, number: int, mailbox: int | None = None) -> list[Connection]:
        posted = [Connection(self, place) for place in range(number)]
        for connection in posted:
            self.mover.post(connection, mailbox)
        return posted

    def received(self, place: int = 0) -> list[list[int]]:
        """The numbers of the connections of each datagram."""
        found = []
        while True:
            try:
                letters = receive_letters(self.readers[place])
            except BlockingIOError:
                return found
            for _, _, fds in letters:
                os.close(fds[0])
            found.append([state.client[1] if state.client else -1 for state, _, _ in letters])

    def close(self) -> None:
        self.mover.update(Receivers(receivers=()), [])
        os.close(self.fd)
        os.close(self._other)
        for one in (*self.readers, *self.writers):
            one.close()


Scenario = Callable[[Rig], Awaitable[None]]


async def turn() -> None:
    await asyncio.sleep(0)


def run(scenario: Scenario) -> None:
    async def main() -> None:
        rig = Rig()
        try:
            await scenario(rig)
        finally:
            rig.close()

    before = open_fds()
    asyncio.run(main())
    assert not open_fds() - before, "an fd leaks"


def test_what_is_posted_in_one_turn_goes_together_in_the_next() -> None:
    async def scenario(rig: Rig) -> None:
        rig.receivers(1)
        posted = rig.post(2 * MAXIMUM_LETTERS)
        assert rig.received() == []
        await turn()
        numbers = list(range(2 * MAXIMUM_LETTERS))
        assert rig.received() == [numbers[:MAXIMUM_LETTERS], numbers[MAXIMUM_LETTERS:]]
        assert all(one.told == ["moved"] for one in posted)
        assert rig.counters[MOVED] == len(posted)

    run(scenario)


@pytest.mark.parametrize(("connections", "receivers"), [(4, 4), (8, 4), (32, 4), (32, 2), (64, 3)])
def test_a_few_are_shared_evenly_among_the_receivers(connections: int, receivers: int) -> None:
    async def scenario(rig: Rig) -> None:
        rig.receivers(receivers)
        rig.post(connections)
        await turn()
        counts = [sum(map(len, rig.received(place))) for place in range(receivers)]
        assert sum(counts) == connections
        assert max(counts) - min(counts) <= max(1, connections // (2 * receivers))

    run(scenario)


def test_those_that_are_gone_meanwhile_are_left_out() -> None:
    async def scenario(rig: Rig) -> None:
        rig.receivers(1)
        posted = rig.post(6)
        for one in (posted[0], posted[3], posted[5]):
            one.is_gone = True
        await turn()
        assert list(chain(*rig.received())) == [1, 2, 4]
        assert [one.told for one in posted] == [[], ["moved"], ["moved"], [], ["moved"], []]

    run(scenario)


def test_one_that_was_taken_back_and_posted_again_goes_once() -> None:
    async def scenario(rig: Rig) -> None:
        rig.receivers(1)
        posted = rig.post(9)
        for one in posted:
            rig.mover.post(one)
        await turn()
        assert list(chain(*rig.received())) == list(range(9))
        assert all(one.told == ["moved"] for one in posted)
        assert rig.counters[MOVED] == 9

    run(scenario)


def test_each_goes_to_the_receiver_that_it_is_meant_for() -> None:
    async def scenario(rig: Rig) -> None:
        rig.receivers(2)
        rig.post(8, mailbox=1)
        rig.post(8, mailbox=2)
        await turn()
        assert [list(chain(*rig.received(place))) for place in (0, 1)] == [list(range(8))] * 2

    run(scenario)


def test_one_that_cannot_tell_what_it_is_ends_here_and_the_others_move() -> None:
    async def scenario(rig: Rig) -> None:
        rig.receivers(1)
        posted = rig.post(5)
        posted[2].is_broken = True
        await turn()
        assert list(chain(*rig.received())) == [0, 1, 3, 4]
        assert posted[2].told == ["refused"]
        assert (rig.counters[MOVED], rig.counters[REFUSED]) == (4, 1)

    run(scenario)


def test_data_that_does_not_fit_one_datagram_goes_in_several() -> None:
    async def scenario(rig: Rig) -> None:
        rig.receivers(1)
        posted = rig.post(4)
        posted[1].data = bytes(MAXIMUM_INLINE_BYTES - 1)
        posted[2].data = bytes(MAXIMUM_INLINE_BYTES + 1)  # in a memfd
        await turn()
        assert rig.received() == [[0, 1], [2], [3]]
        assert all(one.told == ["moved"] for one in posted)

    run(scenario)


def test_one_that_is_too_large_is_refused_and_those_beside_it_move() -> None:
    async def scenario(rig: Rig) -> None:
        rig.receivers(1)
        posted = rig.post(4)
        posted[2].data = bytes(MAXIMUM_DATA_BYTES + 1)
        await turn()
        assert list(chain(*rig.received())) == [0, 1, 3]
        assert posted[2].told == ["refused"]

    run(scenario)


def test_several_whose_states_are_too_large_together_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handoff.mailbox.MAXIMUM_STATE_BYTES", 100)

    async def scenario(rig: Rig) -> None:
        rig.receivers(1)
        rig.post(4)
        await turn()
        assert rig.received() == [[0], [1], [2], [3]]

    run(scenario)


def test_who_finds_no_room_is_told_once_and_goes_in_order_when_there_is() -> None:
    async def scenario(rig: Rig) -> None:
        rig.receivers(1)
        rig.writers[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        posted: list[Any] = rig.post(200)
        await turn()
        waiting = rig.counters[WAITING]
        assert 0 < waiting < 200
        assert not rig.mover.room(HTTP).is_set()
        late = Connection(rig, 200)
        rig.mover.post(late)
        assert late.told == ["waits"]
        assert rig.counters[WAITING] == waiting + 1
        received: list[int] = []
        while len(received) < 201:
            received += list(chain(*rig.received()))
            await turn()
        assert received == list(range(201))
        assert {tuple(one.told) for one in (*posted, late)} == {("moved",), ("waits", "moved")}
        assert rig.counters[WAITING] == 0
        assert rig.mover.room(HTTP).is_set()

    run(scenario)
