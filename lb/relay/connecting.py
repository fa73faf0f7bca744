"""Beginning a connection to a backend, which is made at once where the backend is within this machine."""

from __future__ import annotations

import errno
import socket

from lb.relay.silence import notice_silence
from lb.relay.targets import Target

PENDING = errno.EINPROGRESS
_STREAM = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_SOCKET, _OOBINLINE = int(socket.SOL_SOCKET), int(socket.SO_OOBINLINE)
_UNIX, _TCP, _NODELAY = int(socket.AF_UNIX), int(socket.IPPROTO_TCP), int(socket.TCP_NODELAY)
_QUICKACK = int(socket.TCP_QUICKACK)


def begin(target: Target, silent_seconds: float | None, speaks: bool) -> tuple[socket.socket | None, int]:
    """The socket, which the caller then owns, and 0, PENDING, or the error's number. No socket: there could be none.

    `speaks`: the server will hear something before it says anything, most likely at once.
    """
    assert target.address is not None
    family, address = target.address
    server: socket.socket | None = None
    try:
        server = socket.SocketType(family, _STREAM)  # type: ignore[assignment]  # the plain class of C: half the cost
        assert server is not None
        if family != _UNIX:
            server.setsockopt(_TCP, _NODELAY, 1)
            server.setsockopt(_SOCKET, _OOBINLINE, 1)  # as what is accepted
            if speaks:
                # What is said carries the last step of the handshake: one segment less, one wake-up of the server.
                server.setsockopt(_TCP, _QUICKACK, 0)
            if not target.is_local:
                notice_silence(server, silent_seconds)
        failure = server.connect_ex(address)
        if failure == PENDING and target.is_local:  # it is done by now, and nobody has said so: ask
            failure = server.connect_ex(address)
            if failure == errno.EALREADY:
                failure = PENDING
    except OSError as error:
        failure = error.errno or errno.EIO
    return server, failure
