"""A mailbox: a SEQPACKET pair through which live connections reach a worker. One datagram is one connection.

A datagram is the length of the letter (4 bytes), the letter as JSON, and the bytes that nobody acted on yet; with it
come the connection's fds. What was sent lies in the kernel's queue, and survives the death of both sides, as long as
somebody (the master) keeps the reading end open.
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
_LENGTH_BYTES = 4
_MAXIMUM_DATAGRAM_BYTES = _LENGTH_BYTES + MAXIMUM_STATE_BYTES + MAXIMUM_INLINE_BYTES

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Letter)


class TooLarge(Exception):
    """The state or the data does not fit a letter. Nothing was sent."""


class Unreadable(Exception):
    """A datagram that is none of ours; its fds are closed. The next one may be fine."""


def mailbox_pair() -> tuple[socket.socket, socket.socket]:
    """(writing end, reading end), both close-on-exec and non-blocking; the caller owns them."""
    writer, reader = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    writer.setblocking(False)
    reader.setblocking(False)
    return writer, reader


def send_letter(writer: socket.socket, state: AnyState, data: bytes, fds: Sequence[int]) -> None:
    """Hand over: after this returned, the fds belong to the reader too, and the caller closes its own.

    Raises TooLarge, BlockingIOError (the queue is full), and OSError: ETOOMANYREFS when too many fds are under way
    (unix(7); polling does not tell when that is over), EPIPE when nobody has the reading end.
    """
    if len(data) > MAXIMUM_DATA_BYTES:
        raise TooLarge(f"{len(data)} bytes of data; at most {MAXIMUM_DATA_BYTES}")
    is_inline = len(data) <= MAXIMUM_INLINE_BYTES
    head = _encoder.encode(Letter(state=state, fds=len(fds), size=len(data), in_memfd=not is_inline))
    if len(head) > MAXIMUM_STATE_BYTES:
        raise TooLarge(f"a state of {len(head)} bytes; at most {MAXIMUM_STATE_BYTES}")
    prefix = len(head).to_bytes(_LENGTH_BYTES, "big") + head
    if is_inline:
        send_datagram(writer, prefix + data, fds)
        return
    memfd = sealed_memfd("handoff-letter", data)
    try:
        send_datagram(writer, prefix, [*fds, memfd])
    finally:
        os.close(memfd)


def receive_letter(reader: socket.socket) -> tuple[AnyState, bytes, list[int]]:
    """The next connection: its state, its data, and its fds, which the caller then owns.

    Receive only with head-room for fds: without it the kernel destroys the connection. Raises BlockingIOError when
    there is none, EOFError when there are no writers any more either, and Unreadable.
    """
    data, fds, was_cut = receive_datagram(reader, _MAXIMUM_DATAGRAM_BYTES)
    if not data and not fds:
        _raise_end(reader)
    try:
        if was_cut:
            raise Unreadable("a letter was cut short: no room for its fds, or too long")
        letter, rest = _open(data)
        if len(fds) != letter.fds + letter.in_memfd or not fds:
            raise Unreadable(f"a letter came with {len(fds)} fds, declares {letter.fds + letter.in_memfd}")
        if letter.in_memfd:
            rest = _data_in(fds.pop(), letter.size)
        if len(rest) != letter.size:
            raise Unreadable(f"a letter holds {len(rest)} bytes of data, declares {letter.size}")
        return letter.state, rest, fds
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _raise_end(reader: socket.socket) -> NoReturn:
    """Nothing came: the end, or an empty datagram, which looks like one. Only at the end nobody can write any more."""
    poll = select.poll()
    poll.register(reader, select.POLLRDHUP)
    unread = array.array("i", [0])
    fcntl.ioctl(reader.fileno(), termios.FIONREAD, unread)
    if poll.poll(0) and not unread[0]:
        raise EOFError
    raise Unreadable("an empty datagram")


def _open(data: bytes) -> tuple[Letter, bytes]:
    end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "big")
    try:
        return _decoder.decode(data[_LENGTH_BYTES:end]), data[end:]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unreadable(f"not a letter: {error}") from None


def _data_in(memfd: int, size: int) -> bytes:
    try:
        return read_memfd(memfd, size, MAXIMUM_DATA_BYTES)
    except MemfdBroken as error:
        raise Unreadable(str(error)) from None
    finally:
        os.close(memfd)


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
    """Borrows the fds. Raises OSError as `send_letter` does."""
    send_datagram(writer, data, fds)
