"""Letters: what goes in comes out, what is none harms nobody, and no fd is lost on the way."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Iterator

import pytest

from handoff.core.moves import MAXIMUM_DATA_BYTES, MAXIMUM_STATE_BYTES, HTTPState
from handoff.mailbox import (
    MAXIMUM_INLINE_BYTES,
    MAXIMUM_LETTERS,
    TooLarge,
    Unreadable,
    count_letters,
    mailbox_pair,
    put_unread,
    receive_letters,
    send_letters,
    take_unread,
    unread_bytes,
)
from handoff.rights import send_datagram
from tests.unit.fds import open_fds
from tests.unit.letters import receive_letter, send_letter

STATE = HTTPState(client=("192.0.2.1", 4711), scheme="https", is_answered=True, keep_alive_until=12.5)

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def mailbox() -> Iterator[Pair]:
    before = open_fds()
    writer, reader = mailbox_pair()
    yield writer, reader
    writer.close()
    reader.close()
    assert not open_fds() - before, "an fd leaks"


@pytest.fixture
def connection(mailbox: Pair) -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.mark.parametrize("size", [0, 1, MAXIMUM_INLINE_BYTES, MAXIMUM_INLINE_BYTES + 1, 1_000_000])
def test_a_connection_arrives_with_its_state_and_its_bytes(mailbox: Pair, connection: Pair, size: int) -> None:
    data = os.urandom(size)
    send_letter(mailbox[0], STATE, data, [connection[1].fileno()])
    connection[1].close()  # the letter keeps it alive
    state, received, fds = receive_letter(mailbox[1])
    assert (state, received) == (STATE, data)
    with socket.socket(fileno=fds[0]) as moved:
        assert not os.get_inheritable(fds[0])
        connection[0].send(b"hello")
        assert moved.recv(10) == b"hello"


def test_letters_come_in_their_order_and_an_empty_mailbox_says_so(mailbox: Pair, connection: Pair) -> None:
    for number in range(3):
        send_letter(mailbox[0], STATE, b"%d" % number, [connection[1].fileno()])
    for number in range(3):
        _, data, fds = receive_letter(mailbox[1])
        os.close(fds[0])
        assert data == b"%d" % number
    with pytest.raises(BlockingIOError):
        receive_letter(mailbox[1])


def test_a_full_mailbox_refuses_and_keeps_what_it_has(mailbox: Pair, connection: Pair) -> None:
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < 100_000:
            send_letter(mailbox[0], STATE, b"", [connection[1].fileno()])
            sent += 1
    assert 50 <= sent < 100_000
    for _ in range(sent):
        os.close(receive_letter(mailbox[1])[2][0])


def test_what_does_not_fit_is_not_sent(mailbox: Pair, connection: Pair) -> None:
    fds = [connection[1].fileno()]
    with pytest.raises(TooLarge):
        send_letter(mailbox[0], STATE, bytes(MAXIMUM_DATA_BYTES + 1), fds)
    with pytest.raises(TooLarge):
        send_letter(mailbox[0], HTTPState(client=("x" * MAXIMUM_STATE_BYTES, 1)), b"", fds)
    with pytest.raises(BlockingIOError):
        receive_letter(mailbox[1])


def test_the_end_comes_when_the_last_writer_has_gone_and_everything_is_read(mailbox: Pair, connection: Pair) -> None:
    send_letter(mailbox[0], STATE, b"last", [connection[1].fileno()])
    mailbox[0].close()
    assert receive_letter_and_close(mailbox[1]) == b"last"
    with pytest.raises(EOFError):
        receive_letter(mailbox[1])
    with pytest.raises(EOFError):
        take_unread(mailbox[1])


def receive_letter_and_close(reader: socket.socket) -> bytes:
    _, data, fds = receive_letter(reader)
    for fd in fds:
        os.close(fd)
    return data


def datagram_of(head: bytes, data: bytes = b"") -> bytes:
    return len(head).to_bytes(4, "big") + head + data


ONE = b'{"state":{"kind":"http/1"}}'

GARBAGE = [
    (b"x", 1),
    (b"\xff\xff\xff\xff{}", 1),
    (datagram_of(b"{}"), 1),
    (datagram_of(b"[]"), 1),
    (datagram_of(ONE), 1),
    (datagram_of(b'[{"state":{"kind":"http/2"}}]'), 1),
    (datagram_of(b"[%b]" % ONE), 0),
    (datagram_of(b"[%b]" % ONE), 2),
    (datagram_of(b"[%b,%b]" % (ONE, ONE)), 1),
    (datagram_of(b"[%b]" % ONE, b"too much"), 1),
    (datagram_of(b'[{"state":{"kind":"http/1"},"size":9}]', b"short"), 1),
    (datagram_of(b'[{"state":{"kind":"http/1"},"size":-1},{"state":{"kind":"http/1"},"size":1}]'), 2),
    (datagram_of(b'[{"state":{"kind":"http/1"},"fds":0}]'), 0),
    (datagram_of(b'[{"state":{"kind":"http/1"},"fds":-1},{"state":{"kind":"http/1"},"fds":2}]'), 1),
    (datagram_of(b'[{"state":{"kind":"http/1"},"size":7,"in_memfd":true}]'), 2),
    (datagram_of(b'[%b,{"state":{"kind":"http/1"},"size":7,"in_memfd":true}]' % ONE), 3),
    (b"\0\0\0\0" + bytes(60_000), 1),
]


@pytest.mark.parametrize(("datagram", "fds"), GARBAGE)
def test_what_is_no_letter_is_closed_and_the_next_one_is_fine(
    mailbox: Pair, connection: Pair, datagram: bytes, fds: int
) -> None:
    before = open_fds()
    send_datagram(mailbox[0], datagram, [connection[1].fileno()] * fds)
    send_letter(mailbox[0], STATE, b"fine", [connection[1].fileno()])
    with pytest.raises(Unreadable):
        receive_letter(mailbox[1])
    assert not open_fds() - before
    assert receive_letter_and_close(mailbox[1]) == b"fine"


def test_several_connections_travel_in_one_datagram_each_with_its_own(mailbox: Pair, connection: Pair) -> None:
    fd = connection[1].fileno()
    sent = [
        (HTTPState(client=(f"192.0.2.{number}", number)), b"x" * number, [fd] * (1 + number % 2))
        for number in range(MAXIMUM_LETTERS)
    ]
    send_letters(mailbox[0], sent)
    received = receive_letters(mailbox[1])
    assert [(state, data, len(fds)) for state, data, fds in received] == [
        (state, data, len(fds)) for state, data, fds in sent
    ]
    for _, _, fds in received:
        for one in fds:
            os.close(one)


def test_what_does_not_fit_together_is_not_sent(mailbox: Pair, connection: Pair) -> None:
    fds = [connection[1].fileno()]
    for several in (
        [(STATE, b"", fds)] * (MAXIMUM_LETTERS + 1),
        [(STATE, bytes(MAXIMUM_INLINE_BYTES), fds), (STATE, b"x", fds)],
        [(HTTPState(client=("x" * (MAXIMUM_STATE_BYTES // 2), 1)), b"", fds)] * 2,
    ):
        with pytest.raises(TooLarge):
            send_letters(mailbox[0], several)
    with pytest.raises(BlockingIOError):
        receive_letters(mailbox[1])


def test_a_datagram_that_is_unreadable_says_how_many_are_lost(mailbox: Pair, connection: Pair) -> None:
    send_datagram(mailbox[0], datagram_of(b"[%b,%b,%b]" % (ONE, ONE, ONE)), [connection[1].fileno()] * 2)
    with pytest.raises(Unreadable) as caught:
        receive_letters(mailbox[1])
    assert caught.value.connections == 3


def test_what_comes_without_room_for_its_fds_is_counted(mailbox: Pair, connection: Pair) -> None:
    send_letters(mailbox[0], [(STATE, b"", [connection[1].fileno()])] * 5)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    before = open_fds()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 2, limits[1]))
    try:
        with pytest.raises(Unreadable) as caught:
            receive_letters(mailbox[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.connections == 5
    assert open_fds() == before


def test_letters_that_nobody_will_read_are_counted(mailbox: Pair, connection: Pair) -> None:
    send_letters(mailbox[0], [(STATE, b"", [connection[1].fileno()])] * 3)
    datagram, fds = take_unread(mailbox[1])
    for fd in fds:
        os.close(fd)
    assert count_letters(datagram) == 3
    assert count_letters(b"garbage") == count_letters(datagram_of(b"[]")) == 1


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_letter_is_passed_on_unread(mailbox: Pair, connection: Pair, size: int) -> None:
    data = os.urandom(size)
    send_letter(mailbox[0], STATE, data, [connection[1].fileno()])
    datagram, fds = take_unread(mailbox[1])
    put_unread(mailbox[0], datagram, fds)
    for fd in fds:
        os.close(fd)
    state, received, fds = receive_letter(mailbox[1])
    os.close(fds[0])
    assert (state, received) == (STATE, data)


def test_a_writer_sees_whether_everything_was_read(mailbox: Pair, connection: Pair) -> None:
    assert unread_bytes(mailbox[0]) == 0
    send_letter(mailbox[0], STATE, b"", [connection[1].fileno()])
    assert unread_bytes(mailbox[0]) > 0
    receive_letter_and_close(mailbox[1])
    assert unread_bytes(mailbox[0]) == 0
