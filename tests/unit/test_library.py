"""The blocking worker's library and its mailbox, against a master that the test plays."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
from collections.abc import Iterator

import pytest

from handoff.channel import master_end, worker_end
from handoff.core.messages import Boot, Closed, Drain, Open, ReceiverInfo, Receivers
from handoff.core.moves import RAW, RawState
from handoff.counters import ADOPTED, ADOPTING, CONNECTIONS, MOVED, REFUSED, CounterPage, WorkerCounters
from handoff.mailbox import mailbox_pair
from handoff.rights import send_datagram
from handoff.settings import Settings
from handoff.worker.context import Claims
from handoff.worker.library import Worker
from handoff.worker.link import Link
from tests.unit.letters import receive_letter, send_letter


class Played:
    """A master with one worker, in one process. Owns everything."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.master = master_end(ours)
        self.writer, reader = mailbox_pair()
        self.page = CounterPage()
        self.row, self.sibling_row = self.page.take_row(), self.page.take_row()
        boot = Boot(
            generation=1,
            label="",
            slot=0,
            worker=1,
            settings=Settings(app="main:main", name="web"),
            listeners=(),
            counters_fd=-1,
            counters_row=self.row,
            mailbox_fd=reader.detach(),
        )
        counters = WorkerCounters(os.dup(self.page.fd), self.row)
        self.counters = counters.own
        self._channel = worker_end(theirs)
        self.worker = Worker(boot, Link(self._channel), Claims(boot), counters)

    def begin(self, tells_closed: bool = False) -> None:
        self.master.send(Open())
        assert self.worker.ready(adopts=True, tells_closed=tells_closed)

    def close(self) -> None:
        self.master.close()
        self._channel.close()
        self.writer.close()
        os.close(self.page.fd)
        worker = self.worker  # in life the process ends, and closes these
        for one in (worker._mailbox, worker._wake_reader, worker._wake_writer, worker._epoll):
            one.close()  # type: ignore[attr-defined]
        worker._outbox.update(Receivers(receivers=()), [])


@pytest.fixture
def unready() -> Iterator[Played]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    found = Played()
    yield found
    found.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def played(unready: Played) -> Played:
    unready.begin()
    return unready


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
    assert played.counters[ADOPTING], "its connections do not count it yet"
    assert played.worker.adopted() == []
    assert played.counters[ADOPTED] == 1
    assert not played.counters[ADOPTING]


@pytest.mark.parametrize("counts", [True, False])
def test_who_counts_what_was_adopted_or_comes_back_for_more_has_adopted_it(
    played: Played, connection: tuple[socket.socket, socket.socket], counts: bool
) -> None:
    send_letter(played.writer, RawState(), b"", [connection[1].fileno()])
    for fds, _ in played.worker.adopted_fds():
        os.close(fds[0])
    assert played.counters[ADOPTING]
    if counts:
        played.worker.connections = 1
    else:
        assert not played.worker.wait(0)
    assert not played.counters[ADOPTING]


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


def test_a_worker_hears_that_its_master_is_dead(played: Played) -> None:
    assert not played.worker.is_orphan
    played.master.close()
    assert played.worker.wait()
    assert played.worker.is_orphan


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


def test_when_mailboxes_are_full_the_worker_is_readable_as_soon_as_there_is_room(
    played: Played, connection: tuple[socket.socket, socket.socket]
) -> None:
    worker, (_, theirs) = played.worker, connection
    writer, reader = mailbox_pair()
    with writer, reader:
        played.master.send(Drain(seconds=30.0, moves=True))
        info = ReceiverInfo(mailbox=7, row=played.sibling_row, adopts=(RAW,), is_new=True)
        played.master.send(Receivers(receivers=(info,), fds=1), [writer.fileno()])
        assert worker.wait(0)
        assert not worker.has_unread
        while worker.hand_over([theirs.fileno()]):
            pass
        assert worker.has_unread
        poll = select.poll()
        poll.register(worker, select.POLLIN)
        assert poll.poll(0) == []
        while worker.has_unread:
            os.close(receive_letter(reader)[2][0])
        assert poll.poll(0) != []
        assert worker.wait(0)
        assert poll.poll(0) == [], "told once"
        assert worker.hand_over([theirs.fileno()])
        os.close(receive_letter(reader)[2][0])


def test_what_is_above_its_share_a_worker_gives_to_siblings_that_have_less(
    played: Played, connection: tuple[socket.socket, socket.socket]
) -> None:
    worker, (_, theirs) = played.worker, connection
    mailboxes = [mailbox_pair() for _ in range(2)]
    rows = [played.sibling_row, played.page.take_row()]
    infos = tuple(
        ReceiverInfo(mailbox=number, row=row, adopts=(RAW,), is_new=True) for number, row in enumerate(rows, 7)
    )
    played.master.send(Receivers(receivers=infos, fds=2), [writer.fileno() for writer, _ in mailboxes])
    WorkerCounters(os.dup(played.page.fd), rows[0]).own[CONNECTIONS] = 8
    worker.connections = 10
    assert not worker.wait(0)
    assert worker.surplus() == 4, "18 over 3, and the other with more than its share gives the rest"
    for _ in range(4):
        assert worker.hand_over([theirs.fileno()])
    with pytest.raises(BlockingIOError):
        receive_letter(mailboxes[0][1])
    assert worker.surplus() == 0, "not before what was sent is read"
    sibling = WorkerCounters(os.dup(played.page.fd), rows[1]).own
    sibling[ADOPTING] = 1
    for _ in range(4):
        os.close(receive_letter(mailboxes[1][1])[2][0])
    assert worker.has_unread
    assert worker.surplus() == 0, "nor before it is counted"
    sibling[CONNECTIONS] = 4
    sibling[ADOPTING] = 0
    assert not worker.has_unread
    worker.connections = 6
    assert worker.surplus() == 0
    for pair in mailboxes:
        for end in pair:
            end.close()


def test_a_worker_that_drains_is_readable_only_while_there_is_something(played: Played) -> None:
    worker = played.worker
    os.kill(os.getpid(), signal.SIGTERM)
    poll = select.poll()
    poll.register(worker, select.POLLIN)
    assert worker.wait(0)
    assert poll.poll(0) == [], "no spin"
    played.master.close()
    assert worker.wait(0)
    assert poll.poll(0) == [], "nor when the master is gone"


def test_fds_that_are_no_sockets_are_adopted_as_fds(played: Played) -> None:
    reader, writer = os.pipe()
    send_letter(played.writer, RawState(), b"state", [reader, writer])
    os.close(reader)
    os.close(writer)
    [(fds, state)] = played.worker.adopted_fds()
    assert state == b"state"
    os.write(fds[1], b"in the pipe")
    assert os.read(fds[0], 100) == b"in the pipe"
    for fd in fds:
        os.close(fd)
    assert played.counters[ADOPTED] == 1
    reader, writer = os.pipe()
    send_letter(played.writer, RawState(), b"state", [reader, writer])
    os.close(reader)
    os.close(writer)
    assert played.worker.adopted() == [], "no sockets"
    assert (played.counters[ADOPTED], played.counters[REFUSED]) == (1, 1)


def test_without_fds_for_them_connections_wait_and_nothing_spins(
    played: Played, connection: tuple[socket.socket, socket.socket]
) -> None:
    worker, (_, theirs) = played.worker, connection
    send_letter(played.writer, RawState(), b"", [theirs.fileno()])
    poll = select.poll()
    poll.register(worker, select.POLLIN)
    assert poll.poll(0) != []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 10, limits[1]))
    try:
        assert worker.adopted() == []
        assert poll.poll(0) == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    [([adopted], _)] = worker.adopted()
    adopted.close()
    send_letter(played.writer, RawState(), b"", [theirs.fileno()])
    assert poll.poll(0) != [], "it is told of the next one"
    [([adopted], _)] = worker.adopted()
    adopted.close()


def said_closed(played: Played) -> bool:
    said = []
    with contextlib.suppress(BlockingIOError):
        while True:
            said.append(played.master.receive()[0])
    return Closed() in said


@pytest.mark.parametrize("tells", [False, True])
def test_a_program_accepts_nobody_as_soon_as_it_hears_of_a_drain_or_when_it_says_so(
    unready: Played, tells: bool
) -> None:
    worker = unready.worker
    unready.begin(tells_closed=tells)
    unready.master.send(Drain(seconds=30.0, moves=True))
    assert worker.surplus() == 0
    assert worker.drain_seconds is not None
    assert not said_closed(unready), "the program has not heard of it"
    assert worker.wait(0)
    assert said_closed(unready) is not tells
    worker.closed()
    assert said_closed(unready) is tells
    worker.closed()
    assert not said_closed(unready), "once"
