"""One listening socket for each slot, on one address: SO_REUSEPORT, and a program that says who gets a new connection.

Sockets are never closed one by one: what is queued on one, and handshakes under way to it, would be reset. A slot that
nobody serves is steered away from instead, and a sibling goes on accepting from its socket.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
from collections.abc import Sequence

from handoff.core.steering import Instruction, program

IP_FREEBIND = 15  # ip(7); Python has no name for either
SO_ATTACH_REUSEPORT_CBPF = 51  # asm-generic/socket.h
_FILTER = struct.Struct("HBBI")  # struct sock_filter
_PROGRAM = struct.Struct("HP")  # struct sock_fprog


class SlotSockets:
    """The sockets of one address, by slot. Owns those from slot 1 on; the first one is its listener's."""

    def __init__(self, first: socket.socket) -> None:
        """`first` listens, and was bound with SO_REUSEPORT."""
        self._first = first
        self._more: list[socket.socket] = []

    def __len__(self) -> int:
        return 1 + len(self._more)

    def of(self, slot: int, backlog: int) -> socket.socket:
        """The slot's socket, made now where it is new; borrowed. Raises OSError.

        The kernel numbers the sockets in the order in which they began to listen, so none is left out.
        """
        while len(self) <= slot:
            self._more.append(self._another(backlog))
        return self._first if slot == 0 else self._more[slot - 1]

    def listen(self, backlog: int) -> None:
        for one in self._more:
            one.listen(backlog)

    def steer(self, slots: Sequence[int]) -> None:
        """New connections go to these slots, evenly, and to no other. Raises OSError."""
        attach(self._first, program(slots))

    def close(self) -> None:
        while self._more:
            self._more.pop().close()

    def _another(self, backlog: int) -> socket.socket:
        with contextlib.ExitStack() as undo:
            one = undo.enter_context(socket.socket(self._first.family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
            one.setblocking(False)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if one.family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if self._first.getsockopt(socket.IPPROTO_IP, IP_FREEBIND):
                one.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
            one.bind(self._first.getsockname())
            one.listen(backlog)
            undo.pop_all()
            return one


def attach(member: socket.socket, instructions: Sequence[Instruction]) -> None:
    """Let the program choose among the sockets of the group that `member` is of: socket(7). Raises OSError."""
    filters = b"".join(_FILTER.pack(*instruction) for instruction in instructions)
    held = ctypes.create_string_buffer(filters, len(filters))
    argument = _PROGRAM.pack(len(instructions), ctypes.addressof(held))
    member.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, argument)
