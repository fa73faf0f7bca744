"""Datagrams of one connection, as most tests want them."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from handoff.core.moves import AnyState
from handoff.mailbox import receive_letters, send_letters


def send_letter(writer: socket.socket, state: AnyState, data: bytes, fds: Sequence[int]) -> None:
    send_letters(writer, [(state, data, fds)])


def receive_letter(reader: socket.socket) -> tuple[AnyState, bytes, list[int]]:
    [connection] = receive_letters(reader)
    return connection
