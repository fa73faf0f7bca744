"""Clients of a stream socket on the master's loop: their bytes in and out, without ever waiting for one."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from handoff.master.log import MasterLog
from handoff.master.loop import Loop, Order

MAXIMUM_PEERS = 64
ACCEPT_AGAIN_SECONDS = 0.1


class Peer:
    """One connected client: its bytes in and out. Owns the socket."""

    def __init__(self, connection: socket.socket, number: int) -> None:
        self.connection = connection
        self.number = number
        self.received = b""
        self.to_send = b""
        self.has_asked = False
        self.is_finished = False
        """Close it when everything is sent."""
        self.has_ended = False
        """It sends no more."""
        self.is_watched = True


class Peers:
    """All clients of one listener, at most 64. Owns the listener, which is non-blocking, and the connections.

    `on_data(peer)` is called whenever there is more in `peer.received`; `is_welcome` judges a new connection.
    """

    def __init__(
        self,
        listener: socket.socket,
        loop: Loop,
        log: MasterLog,
        subject: str,
        maximum_bytes: int,
        on_data: Callable[[Peer], None],
        is_welcome: Callable[[socket.socket], bool] = lambda _: True,
    ) -> None:
        self._listener = listener
        self._loop = loop
        self._log = log
        self._subject = subject
        self._maximum_bytes = maximum_bytes
        self._on_data = on_data
        self._is_welcome = is_welcome
        self._peers: dict[int, Peer] = {}
        self._next_number = 1
        self._again_at: float | None = None
        self._watch_listener()

    def _watch_listener(self) -> None:
        self._again_at = None
        self._loop.watch(self._listener, Order.CONTROL, self._accept, on_failure=self._pause)

    def _pause(self, error: Exception) -> None:
        """Out of fds, say: the listener stays readable, so look away for a moment."""
        if not isinstance(error, OSError):
            self._log.failure(self._subject, error)
        self._loop.forget(self._listener)
        self._again_at = time.monotonic() + ACCEPT_AGAIN_SECONDS

    def next_deadline(self) -> float | None:
        return self._again_at

    def check(self, now: float) -> None:
        if self._again_at is not None and self._again_at <= now:
            self._watch_listener()

    def finish(self, number: int, data: bytes) -> None:
        """Send this and then close. A peer that has gone away is nobody's loss."""
        peer = self._peers.get(number)
        if peer is None or peer.is_finished:
            return
        peer.to_send += data
        peer.is_finished = True
        self._write(peer)

    def refuse(self, peer: Peer, reason: str) -> None:
        """Close the connection of one that sent what we do not take."""
        self._log.warning(f"{self._subject}: closed a peer that sent garbage", reason=reason)
        self._drop(peer)

    def close(self) -> None:
        """What is still to be sent was tried."""
        if self._again_at is None:
            self._loop.forget(self._listener)
        self._listener.close()
        for peer in list(self._peers.values()):
            self._drop(peer)

    # --- accepting --------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # it went away again
            return
        connection.setblocking(False)
        if not self._is_welcome(connection):
            connection.close()
            return
        self._make_room()
        peer = Peer(connection, self._next_number)
        self._next_number += 1
        try:
            self._watch(peer)
        except OSError:  # the kernel watches no more
            connection.close()
            raise
        self._peers[peer.number] = peer

    def _make_room(self) -> None:
        """For one more: who never asked anything goes first, then who waits for the longest time."""
        if len(self._peers) < MAXIMUM_PEERS:
            return
        oldest = min(self._peers.values(), key=lambda peer: (peer.has_asked, peer.number))
        self._log.warning(f"{self._subject}: too many peers; the oldest was dropped", count=len(self._peers))
        self._drop(oldest)

    # --- one of them ------------------------------------------------------------------------------------------------

    def _watch(self, peer: Peer) -> None:
        peer.is_watched = True
        self._loop.watch(
            peer.connection,
            Order.CONTROL,
            lambda: self._serve(peer),
            readable=not peer.has_ended,
            writable=bool(peer.to_send),
            on_failure=lambda error: self._failed(peer, error),
        )

    def _failed(self, peer: Peer, error: Exception) -> None:
        self._log.failure(self._subject, error)
        self._drop(peer)

    def _serve(self, peer: Peer) -> None:
        if peer.to_send:
            self._write(peer)
        if peer.number in self._peers and not peer.has_ended:
            self._read(peer)

    def _read(self, peer: Peer) -> None:
        try:
            data = peer.connection.recv(self._maximum_bytes)
        except BlockingIOError:
            return
        except OSError:
            self._drop(peer)
            return
        if not data:
            self._ended(peer)
            return
        if peer.is_finished:
            return
        peer.received += data
        self._on_data(peer)
        if len(peer.received) > self._maximum_bytes and peer.number in self._peers:
            self.refuse(peer, "a request longer than the limit")

    def _ended(self, peer: Peer) -> None:
        """It sends no more. One that has asked and waits for its answer still gets it (`printf … | nc -N`)."""
        peer.has_ended = True
        if not peer.has_asked:
            self._drop(peer)
        elif peer.to_send:
            self._watch(peer)
        else:
            self._loop.forget(peer.connection)
            peer.is_watched = False

    def _write(self, peer: Peer) -> None:
        try:
            sent = peer.connection.send(peer.to_send, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._drop(peer)
            return
        peer.to_send = peer.to_send[sent:]
        if peer.to_send:
            self._watch(peer)
        elif peer.is_finished:
            self._drop(peer)

    def _drop(self, peer: Peer) -> None:
        if self._peers.pop(peer.number, None) is not None:
            if peer.is_watched:
                self._loop.forget(peer.connection)
            peer.connection.close()
