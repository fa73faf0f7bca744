"""Sockets with one deadline for all that is read from them: a peer that trickles its bytes holds nobody up."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


def left_until(deadline: float) -> float:
    """Seconds until a monotonic deadline. Raises TimeoutError when there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


class _TimedSocket(socket.socket):
    deadline = 0.0

    def recv_into(self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0) -> int:
        self.settimeout(left_until(self.deadline))
        return super().recv_into(buffer, nbytes, flags)


class _TimedTlsSocket(ssl.SSLSocket):
    deadline = 0.0

    def recv_into(self, buffer: WriteableBuffer, nbytes: int | None = None, flags: int = 0) -> int:
        self.settimeout(left_until(self.deadline))
        return super().recv_into(buffer, nbytes, flags)


def connected(host: str, port: int, deadline: float, tls: ssl.SSLContext | None) -> socket.socket:
    """To the first of the host's addresses that takes it; the deadline is that of all that follows, too.

    The caller owns it. Raises OSError, TimeoutError among them.
    """
    problem: OSError = OSError("it has no address")
    for family, address in _addresses(host, port, deadline):
        made = _TimedSocket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        made.deadline = deadline
        try:
            made.settimeout(left_until(deadline))
            made.connect(address)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is None:
                return made
            tls.sslsocket_class = _TimedTlsSocket
            secure = tls.wrap_socket(made, server_hostname=host)  # its handshake has the socket's timeout as a whole
            assert isinstance(secure, _TimedTlsSocket)
            secure.deadline = deadline
            return secure
        except OSError as error:
            made.close()
            problem = error
    raise problem


def _addresses(host: str, port: int, deadline: float) -> list[tuple[socket.AddressFamily, Any]]:
    """The system's resolver knows no deadline: it is asked in a thread, which is left behind."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    else:
        return _looked_up(host, port)
    answers: list[list[tuple[socket.AddressFamily, Any]] | OSError] = []
    has_answered = threading.Event()

    def look_up() -> None:
        try:
            answers.append(_looked_up(host, port))
        except OSError as error:
            answers.append(error)
        has_answered.set()

    threading.Thread(target=look_up, name="handoff-resolve", daemon=True).start()
    if not has_answered.wait(left_until(deadline)):
        raise TimeoutError(f"no address was found of {host} in time")
    answer = answers[0]
    if isinstance(answer, OSError):
        raise answer
    return answer


def _looked_up(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    """Raises OSError, also for names that cannot be."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise OSError(f"{host} is no name") from None
    return [(one[0], one[4]) for one in found]
