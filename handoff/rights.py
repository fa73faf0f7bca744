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
_FD_BYTES = array.array("i").itemsize
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAXIMUM_FDS * _FD_BYTES)


def send_datagram(end: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    """Send one datagram. Borrows the fds. Raises OSError; BlockingIOError when the queue is full."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    end.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def receive_datagram(end: socket.socket, limit_bytes: int) -> tuple[bytes, list[int], bool]:
    """The next datagram, its fds (close-on-exec; the caller owns them), and whether anything of it was cut off.

    No data and no fds: the end. Raises OSError; BlockingIOError when there is nothing yet.
    """
    while True:
        try:
            # MSG_CMSG_CLOEXEC: socket.recv_fds would leave the fds inheritable.
            data, ancillary, flags, _ = end.recvmsg(limit_bytes, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
            break
        except ConnectionResetError:
            # A peer that died with unread input gives ECONNRESET once, *before* its last messages.
            continue
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % _FD_BYTES])
    return data, list(fds), bool(flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC))


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
