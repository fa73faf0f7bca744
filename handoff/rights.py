"""Datagrams with file descriptors over unix sockets: unix(7), SCM_RIGHTS."""

from __future__ import annotations

import array
import os
import resource
import socket
from collections.abc import Sequence

MAXIMUM_FDS = 253
"""unix(7): SCM_MAX_FD."""
FD_HEADROOM = 32
"""Without a free fd the kernel destroys what comes while we receive it; other threads open some too."""
_SOCKET, _RIGHTS = int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS)
_CUT = int(socket.MSG_CTRUNC | socket.MSG_TRUNC)
_CLOSE_ON_EXEC, _NO_SIGNAL = int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_NOSIGNAL)  # the enums' operators are slow
_FD_BYTES = array.array("i").itemsize
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAXIMUM_FDS * _FD_BYTES)
_buffers: dict[int, list[memoryview]] = {}
"""By size, those that nobody receives into now. Memory for the longest datagram, asked for and given back each time, is
felt where thousands of short ones come."""


def send_datagram(end: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    """Send one datagram. Borrows the fds. Raises OSError; BlockingIOError when the queue is full."""
    ancillary = [(_SOCKET, _RIGHTS, array.array("i", fds))] if fds else []
    end.sendmsg([data], ancillary, _NO_SIGNAL)


def receive_datagram(end: socket.socket, limit_bytes: int) -> tuple[bytes, list[int], bool]:
    """The next datagram, its fds (close-on-exec; the caller owns them), and whether anything of it was cut off.

    No data and no fds: the end. Raises OSError; BlockingIOError when there is nothing yet.
    """
    free = _buffers.setdefault(limit_bytes, [])
    try:
        buffer = free.pop()
    except IndexError:
        buffer = memoryview(bytearray(limit_bytes))
    try:
        size, ancillary, flags = _receive_into(end, buffer)
        data = bytes(buffer[:size])
    finally:
        free.append(buffer)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == _SOCKET and kind == _RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % _FD_BYTES])
    return data, list(fds), bool(flags & _CUT)


def _receive_into(end: socket.socket, buffer: memoryview) -> tuple[int, list[tuple[int, int, bytes]], int]:
    """(bytes, ancillary data, flags)."""
    while True:
        try:
            # MSG_CMSG_CLOEXEC: socket.recv_fds would leave the fds inheritable.
            size, ancillary, flags, _ = end.recvmsg_into([buffer], _ANCILLARY_BYTES, _CLOSE_ON_EXEC)
            return size, ancillary, flags
        except ConnectionResetError:
            # A peer that died with unread input gives ECONNRESET once, *before* its last messages.
            continue


def has_headroom(fd: int) -> bool:
    """Whether fds may be received. `fd`: any that is open; it is borrowed.

    The kernel gives the lowest free number: where that is far below the limit, there is room above it.
    """
    try:
        lowest_free = os.dup(fd)
    except OSError:
        return False
    os.close(lowest_free)
    return lowest_free + FD_HEADROOM <= resource.getrlimit(resource.RLIMIT_NOFILE)[0]
