"""A client, a server, and a relay between them in this process, stepped by hand."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from lb.relay.letters import plain_socket
from lb.relay.loop import Loop
from lb.relay.relay import Closed, Limits, Relay, RelayState

DEADLINE_SECONDS = 20.0


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    for one in (ours, theirs):
        one.setblocking(False)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs


@dataclass
class Peer:
    """One end outside of the relay, with what it did and saw."""

    sock: socket.socket
    sent: bytearray = field(default_factory=bytearray)
    seen: bytearray = field(default_factory=bytearray)
    ending: str = ""
    """What it saw at the end: "fin" or "reset"."""
    has_ended: bool = False
    has_sent_fin: bool = False
    has_reset: bool = False
    is_refused: bool = False
    """A send has failed, which takes the error of a reset away: what looks like an end is that reset."""
    arrived: int = 0
    """So many bytes had reached the relay when it reset."""

    def send(self, data: bytes, flags: int = 0) -> None:
        if self.has_ended:
            return
        try:
            self.sent += data[: self.sock.send(data, flags)]
        except BlockingIOError:
            pass
        except ConnectionError:
            self.is_refused = True

    def send_urgent(self) -> None:
        """A byte that TCP marks: it stays in its place among the others."""
        self.send(b"U", socket.MSG_OOB)

    def read(self, size: int) -> None:
        if self.ending or self.has_reset:
            return
        try:
            data = self.sock.recv(size)
        except BlockingIOError:
            return
        except OSError:
            self.ending = "reset"
            return
        self.seen += data
        if not data:
            self.ending = "reset" if self.is_refused else "fin"

    def fin(self) -> None:
        if not self.has_ended:
            self.has_ended = self.has_sent_fin = True
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        if self.has_reset:
            return
        self.has_ended = self.has_reset = True
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


class Rig:
    """A client, a server, and a relay between them, stepped by hand."""

    def __init__(self, limits: Limits | None = None, first: bytes = b"", buffer_bytes: int = 0) -> None:
        """`buffer_bytes`: of the kernel, on the way out of the relay; 0: its own choice."""
        client, relay_client = tcp_pair()
        server, relay_server = tcp_pair()
        self.client, self.server = Peer(client), Peer(server)
        self.sockets = relay_client, relay_server
        for one in (*self.sockets, client, server):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        if buffer_bytes:  # on the way out of the relay: much comes in, and goes out in small pieces
            for one in self.sockets:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        self.loop = Loop()
        self.closed: Closed | None = None
        self.relay = Relay(
            relay_client,
            relay_server,
            self.loop,
            limits or Limits(),
            lambda _, closed: setattr(self, "closed", closed),
            first,
        )

    def move(self) -> None:
        """To another loop, as it goes to another process. The epoll of the old loop must forget it."""
        if self.closed is not None:
            return
        state, fds = self.relay.state()
        data, fds = msgspec.msgpack.encode(state), tuple(map(os.dup, fds))
        self.relay.let_go()
        assert self.loop.is_idle
        assert self.loop.turn(0) == 0, "no ghosts"
        self.loop.shut_down()
        self.loop = Loop()
        self.sockets = client, server = plain_socket(fds[0]), plain_socket(fds[1])
        moved = msgspec.msgpack.decode(data, type=RelayState), fds[2:]
        self.relay = Relay(client, server, self.loop, self.relay._limits, self.relay._on_close, moved=moved)
        assert self.relay.state()[0] == state

    def reset(self, peer: Peer) -> None:
        """By this peer; what has arrived until then is to be passed on."""
        if self.closed is None and not peer.has_reset:
            is_client = peer is self.client
            total, sock = self.relay.totals[not is_client], self.sockets[not is_client]
            peer.arrived = total + int.from_bytes(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)), sys.byteorder)
        peer.reset()

    def step(self, timeout: float = 0.0) -> bool:
        return self.loop.turn(timeout) > 0

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, (self.client, self.server, self.closed)
            self.step(0.001)

    def finish(self, *peers: Peer) -> None:
        """Let everything flow, and these peers read, until they have seen an end."""

        def have_ended() -> bool:
            for peer in peers:
                peer.read(1 << 20)
            return self.closed is not None and all(peer.ending or peer.has_reset for peer in peers)

        self.until(have_ended)

    def close(self) -> None:
        self.relay.close()
        self.loop.shut_down()
        for peer in (self.client, self.server):
            peer.sock.close()
