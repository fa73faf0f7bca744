"""The blocking worker's library and its mailbox, against a master that the test plays."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator

import pytest

from handoff.channel import master_end, worker_end
from handoff.core.messages import Boot, Drain, Open, ReceiverInfo, Receivers
from handoff.core.moves import RAW, RawState
from handoff.counters import ADOPTED, FIELDS, MOVED, REFUSED
from handoff.mailbox import mailbox_pair, receive_letter, send_letter
from handoff.rights import send_datagram
from handoff.settings import Settings
from handoff.worker.context import Claims
from handoff.worker.library import Worker
from handoff.worker.link import Link


class Played:
    """A master with one worker, in one process. Owns everything."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.master = master_end(ours)
        self.writer, reader = mailbox_pair()
        boot = Boot(
            generation=1,
            label="",
            slot=0,
            worker=1,
            settings=Settings(app="main:main", name="web"),
            listeners=(),
            counters_fd=-1,
            counters_row=0,
            mailbox_fd=reader.detach(),
        )
        self.counters = memoryview(bytearray(FIELDS * 8)).cast("Q")
        self._channel = worker_end(theirs)
        self.worker = Worker(boot, Link(self._channel), Claims(boot), self.counters)

    def begin(self) -> None:
        self.master.send(Open())
        assert self.worker.ready(adopts=True)

    def close(self) -> None:
        self.master.close()
        self._channel.close()
        self.writer.close()
        worker = self.worker  # in life the process ends, and closes these
        for one in (worker._mailbox, worker._wake_reader, worker._wake_writer, worker._epoll):
            one.close()  # type: ignore[attr-defined]
        worker._outbox.update(Receivers(receivers=()), [])


@pytest.fixture
def played() -> Iterator[Played]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    found = Played()
    found.begin()
    yield found
    found.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_what_lies_in_the_mailbox_is_adopted_with_its_state(
    played: Played, connection: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = connection
    send_letter(played.writer, RawState(), b"state", [theirs.fileno()])
    theirs.close()
    assert not played.worker.wait()
    [([adopted], state)] = played.worker.adopted()
    with adopted:
        assert state == b"state"
        assert not adopted.getblocking()
        adopted.send(b"hello")
        assert ours.recv(10) == b"hello"
    assert played.worker.adopted() == []
    assert played.counters[ADOPTED] == 1


def test_the_writing_end_may_close_before_the_word_of_a_drain_comes(
    played: Played, connection: tuple[socket.socket, socket.socket]
) -> None:
    send_letter(played.writer, RawState(), b"", [connection[1].fileno()])
    played.writer.close()
    [([adopted], _)] = played.worker.adopted()  # what was sent before is there still
    adopted.close()
    assert not played.worker.wait(0)
    assert played.worker.adopted() == []
    assert not played.worker.wait(0.01), "the end of the mailbox wakes nobody any more"
    played.master.send(Drain(seconds=30.0, moves=True))
    assert played.worker.wait()
    assert played.worker.adopted() == []


def test_what_is_no_letter_is_counted_and_the_next_is_adopted(
    played: Played, connection: tuple[socket.socket, socket.socket]
) -> None:
    send_datagram(played.writer, b"garbage", [connection[0].fileno()])
    send_letter(played.writer, RawState(), b"", [connection[1].fileno()])
    [([adopted], _)] = played.worker.adopted()
    adopted.close()
    assert (played.counters[REFUSED], played.counters[ADOPTED]) == (1, 1)


def test_after_the_word_of_a_drain_the_mailbox_is_left_to_others(
    played: Played, connection: tuple[socket.socket, socket.socket]
) -> None:
    send_letter(played.writer, RawState(), b"", [connection[1].fileno()])
    played.master.send(Drain(seconds=30.0, moves=True))
    assert played.worker.wait()
    assert played.worker.adopted() == []


def test_a_second_word_of_a_drain_takes_no_listener_back_that_ends(played: Played) -> None:
    played.master.send(Drain(seconds=30.0, ending=("web",)))
    played.master.send(Drain(seconds=10.0))
    assert played.worker.wait()
    assert played.worker.ending_listeners == {"web"}
    assert (played.worker.drain_seconds or 99.0) <= 10.0


def test_hand_over_needs_a_drain_and_a_receiver_and_gives_the_fds_away(
    played: Played, connection: tuple[socket.socket, socket.socket]
) -> None:
    worker, (ours, theirs) = played.worker, connection
    assert not worker.can_hand_over
    assert not worker.hand_over([theirs.fileno()])
    writer, reader = mailbox_pair()
    with writer, reader:
        played.master.send(Drain(seconds=30.0, moves=True))
        info = ReceiverInfo(mailbox=7, row=1, adopts=(RAW,), is_new=True)
        played.master.send(Receivers(receivers=(info,), fds=1), [writer.fileno()])
        assert worker.can_hand_over
        assert worker.hand_over([theirs.fileno()], b"state")
        theirs.close()
        _, state, [fd] = receive_letter(reader)
        with socket.socket(fileno=fd) as moved:
            moved.send(b"hello")
            assert (state, ours.recv(10)) == (b"state", b"hello")
        assert played.counters[MOVED] == 1
        with pytest.raises(ValueError, match="17 fds"):
            worker.hand_over([ours.fileno()] * 17)
        with pytest.raises(ValueError, match="0 fds"):
            worker.hand_over([])
        with pytest.raises(ValueError, match="16777217 bytes"):
            worker.hand_over([ours.fileno()], bytes(16 * 1024 * 1024 + 1))
