"""Peers that are gone without a word: a machine without power, a network that is cut. Only TCP can notice that."""

from __future__ import annotations

import socket

_MAXIMUM_IDLE_SECONDS = 32767  # tcp(7): MAX_TCP_KEEPIDLE
_PROBES = 4
"""Before it is given up."""


def notice_silence(sock: socket.socket, seconds: float | None) -> None:
    """One that has not answered for so long is given up, whether it was sent something (TCP_USER_TIMEOUT) or nothing
    (keepalive). A listener's connections have it from the listener: tcp(7). None: never."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, seconds is not None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0 if seconds is None else int(seconds * 1000))
    if seconds is not None:
        idle = min(max(1, int(seconds / 2)), _MAXIMUM_IDLE_SECONDS)
        between = min(max(1, int(seconds / 2 / _PROBES)), _MAXIMUM_IDLE_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, between)
