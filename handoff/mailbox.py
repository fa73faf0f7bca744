"""A mailbox: a SEQPACKET pair through which live connections reach a worker. One datagram is one to sixteen of them.

A datagram is the length of its head (4 bytes), the head, a JSON array of letters, and for each letter the bytes that
nobody acted on yet; with it come the connections' fds. What was sent lies in the kernel's queue, and survives the death
of both sides, as long as somebody (the master) keeps the reading end open.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import socket
import termios
from collections.abc import Sequence
from typing import NoReturn

import msgspec

from handoff.core.moves import MAXIMUM_DATA_BYTES, MAXIMUM_STATE_BYTES, AnyState, Letter
from handoff.memfd import MemfdBroken, read_memfd, sealed_memfd
from handoff.rights import receive_datagram, send_datagram

MAXIMUM_INLINE_BYTES = 32 * 1024
"""More data than this travels in a memfd: many letters must fit the queue, and one datagram has its limit."""
MAXIMUM_LETTERS = 16
"""In one datagram. The receiver must have room for all its fds, and serves nobody else while it takes them."""
_QUEUE_BYTES = 32 * 1024
"""For the kernel, which takes it twice: some 220 connections, 85 where each comes alone. Clients of those that lie in
the queue wait; with the kernel's own size it holds 740, and the longest answer took twice as long."""
_LENGTH_BYTES = 4
_MAXIMUM_DATAGRAM_BYTES = _LENGTH_BYTES + MAXIMUM_STATE_BYTES + MAXIMUM_INLINE_BYTES

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(list[Letter])

Connection = tuple[AnyState, bytes, Sequence[int]]
"""What is sent: its state, the bytes that nobody acted on, and its fds, borrowed."""


class TooLarge(Exception):
    """The state or the data does not fit a letter. Nothing was sent."""


class Unreadable(Exception):
    """A datagram that is none of ours; its fds are closed. The next one may be fine."""

    def __init__(self, reason: str, connections: int = 1) -> None:
        super().__init__(reason)
        self.connections = max(1, connections)
        """How many were lost, as far as can be told."""


def mailbox_pair() -> tuple[socket.socket, socket.socket]:
    """(writing end, reading end), both close-on-exec and non-blocking; the caller owns them."""
    writer, reader = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _QUEUE_BYTES)
    writer.setblocking(False)
    reader.setblocking(False)
    return writer, reader


def send_letters(writer: socket.socket, connections: Sequence[Connection]) -> None:
    """Hand over 1 to 16, all or none: after this returned, their fds belong to the reader too, and the caller closes
    its own.

    Raises TooLarge (several may fit one by one), BlockingIOError (the queue is full), and OSError: ETOOMANYREFS when
    too many fds are under way (unix(7); polling does not tell when that is over), EPIPE when nobody has the reading
    end.
    """
    if len(connections) == 1 and len(connections[0][1]) > MAXIMUM_INLINE_BYTES:
        _send_in_memfd(writer, *connections[0])
        return
    data = b"".join([data for _, data, _ in connections])
    if len(data) > MAXIMUM_INLINE_BYTES or len(connections) > MAXIMUM_LETTERS:
        raise TooLarge(f"{len(connections)} connections with {len(data)} bytes of data")
    letters = [Letter(state=state, fds=len(fds), size=len(data)) for state, data, fds in connections]
    send_datagram(writer, _head(letters) + data, [fd for _, _, fds in connections for fd in fds])


def _send_in_memfd(writer: socket.socket, state: AnyState, data: bytes, fds: Sequence[int]) -> None:
    if len(data) > MAXIMUM_DATA_BYTES:
        raise TooLarge(f"{len(data)} bytes of data; at most {MAXIMUM_DATA_BYTES}")
    head = _head([Letter(state=state, fds=len(fds), size=len(data), in_memfd=True)])
    memfd = sealed_memfd("handoff-letter", data)
    try:
        send_datagram(writer, head, [*fds, memfd])
    finally:
        os.close(memfd)


def _head(letters: list[Letter]) -> bytes:
    head = _encoder.encode(letters)
    if len(head) > MAXIMUM_STATE_BYTES:
        raise TooLarge(f"states of {len(head)} bytes; at most {MAXIMUM_STATE_BYTES}")
    return len(head).to_bytes(_LENGTH_BYTES, "big") + head


def receive_letters(reader: socket.socket) -> list[tuple[AnyState, bytes, list[int]]]:
    """The next datagram's connections: for each its state, its data, and its fds, which the caller then owns.

    Receive only with head-room for fds: without it the kernel destroys connections. Raises BlockingIOError when
    there is none, EOFError when there are no writers any more either, and Unreadable.
    """
    data, fds, was_cut = receive_datagram(reader, _MAXIMUM_DATAGRAM_BYTES)
    if not data and not fds:
        _raise_end(reader)
    try:
        if was_cut:
            raise Unreadable("a datagram was cut short: no room for its fds, or too long", count_letters(data))
        return _sorted_out(*_open(data), fds)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _sorted_out(letters: list[Letter], rest: bytes, fds: list[int]) -> list[tuple[AnyState, bytes, list[int]]]:
    """What belongs to which connection. Closes the memfds; raises Unreadable, and then it has closed nothing."""
    declared = sum(letter.fds + letter.in_memfd for letter in letters)
    if len(fds) != declared or not letters or any(letter.fds < 1 or letter.size < 0 for letter in letters):
        raise Unreadable(f"{len(fds)} fds came, {declared} are declared for {len(letters)} connections", len(letters))
    found, memfds, place, begin = [], [], 0, 0
    for letter in letters:
        mine = fds[place : place + letter.fds]
        place += letter.fds
        if letter.in_memfd:
            memfds.append(fds[place])
            data = _data_in(fds[place], letter.size)
            place += 1
        else:
            data = rest[begin : begin + letter.size]
            begin += letter.size
        found.append((letter.state, data, mine))
    if begin != len(rest):
        raise Unreadable(f"{len(rest)} bytes of data came, {begin} are declared", len(letters))
    for memfd in memfds:
        os.close(memfd)
    return found


def _raise_end(reader: socket.socket) -> NoReturn:
    """Nothing came: the end, or an empty datagram, which looks like one. Only at the end nobody can write any more."""
    poll = select.poll()
    poll.register(reader, select.POLLRDHUP)
    unread = array.array("i", [0])
    fcntl.ioctl(reader.fileno(), termios.FIONREAD, unread)
    if poll.poll(0) and not unread[0]:
        raise EOFError
    raise Unreadable("an empty datagram")


def count_letters(datagram: bytes) -> int:
    """How many connections `take_unread` has taken with it; 1 where it is none of ours."""
    try:
        return max(1, len(_open(datagram)[0]))
    except Unreadable:
        return 1


def _open(data: bytes) -> tuple[list[Letter], bytes]:
    end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "big")
    try:
        return _decoder.decode(data[_LENGTH_BYTES:end]), data[end:]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unreadable(f"no letters: {error}") from None


def _data_in(memfd: int, size: int) -> bytes:
    try:
        return read_memfd(memfd, size, MAXIMUM_DATA_BYTES)
    except MemfdBroken as error:
        raise Unreadable(str(error)) from None


def unread_bytes(writer: socket.socket) -> int:
    """The memory of what was written, by anybody, and not read yet (SIOCOUTQ, unix(7)); 0: everything was read."""
    count = array.array("i", [0])
    fcntl.ioctl(writer.fileno(), termios.TIOCOUTQ, count)
    return count[0]


def take_unread(reader: socket.socket) -> tuple[bytes, list[int]]:
    """The next datagram as it is, for `put_unread`; the caller owns its fds.

    Raises BlockingIOError, EOFError, and Unreadable for an empty one.
    """
    data, fds, _ = receive_datagram(reader, _MAXIMUM_DATAGRAM_BYTES)
    if not data and not fds:
        _raise_end(reader)
    return data, fds


def put_unread(writer: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    """Borrows the fds. Raises OSError as `send_letters` does."""
    send_datagram(writer, data, fds)
