"""The relay workers that are connected: each gets every table, or at least the latest, and says what it has taken."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Protocol, cast

from lb.control.peers import Credentials, PrivateListener
from lb.core.table import Table
from lb.core.wire import (
    SOCKET_NAME,
    BadFrame,
    Draining,
    Failed,
    Frames,
    FromRelay,
    Hello,
    Recovered,
    Taken,
    decode_from_relay,
    frame,
)
from lb.page import ROWS

STALLED_SECONDS = 30.0
"""A relay worker that reads nothing for so long is cut off; it connects again when it can."""
MAXIMUM_PEERS = 1024
_LOG = logging.getLogger("handoff.lb")


class Listener(Protocol):
    """What relay workers tell, to the controller."""

    def relay_failed(self, identity: str, reason: str) -> None: ...
    def relay_recovered(self, identity: str) -> None: ...
    def relays_changed(self) -> None:
        """One came, went, took a table or began to drain."""

    def relay_is_ahead(self, revision: int) -> None:
        """It has a later table of this generation than ours: our numbers must go on from there."""

    def process_ended(self) -> None:
        """What it counted as present counts no more."""


class Relays:
    """Owns the socket and its connections. Made on a running loop."""

    def __init__(self, directory: Path, generation: int) -> None:
        self._path = directory / SOCKET_NAME
        self._generation = generation
        self._listener: PrivateListener | None = None
        self._server: asyncio.AbstractServer | None = None
        self._peers: set[RelayPeer] = set()
        self._processes: dict[int, int] = {}
        self._latest: tuple[int, bytes] | None = None
        self.seen: dict[int, int] = {}
        """Rows of the page, and the pids that said they were theirs."""
        self.bound: tuple[str, ...] = ()
        """Where the listeners of this generation really are, as a relay worker has said it."""
        self.watcher: Listener | None = None

    async def open(self) -> None:
        """Raises OSError."""
        loop = asyncio.get_running_loop()
        self._listener = PrivateListener(self._path)
        self._server = await loop.create_unix_server(lambda: RelayPeer(self), sock=self._listener.socket)

    def close(self) -> None:
        if self._server is not None and self._listener is not None:
            self._server.close()
            self._listener.close()
        for peer in list(self._peers):
            peer.abort()
        for fd in self._processes.values():
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)
        self._processes.clear()

    def send(self, table: Table) -> None:
        """To all that said hello, and to each that will."""
        self._latest = table.revision, frame(table)
        for peer in self.connected:
            peer.offer(self._latest[1])

    @property
    def connected(self) -> list[RelayPeer]:
        """Those that said hello, the oldest generation first."""
        known = [peer for peer in self._peers if peer.hello is not None]
        return sorted(known, key=lambda peer: (peer.generation, peer.slot, peer.pid))

    def behind(self, revision: int) -> list[RelayPeer]:
        """Those that have not taken this table, nor a later one."""
        return [peer for peer in self.connected if peer.taken < revision]

    # --- what peers call --------------------------------------------------------------------------------------------

    def admit(self, peer: RelayPeer) -> bool:
        if len(self._peers) >= MAXIMUM_PEERS:
            _LOG.warning("relays.sock: more than %d connections; one is refused", MAXIMUM_PEERS)
            return False
        self._peers.add(peer)
        return True

    def forget(self, peer: RelayPeer) -> None:
        if peer in self._peers:
            self._peers.discard(peer)
            if self.watcher is not None and peer.hello is not None:
                self.watcher.relays_changed()

    def handle(self, peer: RelayPeer, message: FromRelay) -> None:
        """Raises BadFrame for one that is out of place."""
        if peer.hello is None:
            if not isinstance(message, Hello):
                raise BadFrame(f"{type(message).__name__} before Hello")
            peer.hello = message
            if 0 < message.row < ROWS:
                self.seen[message.row] = peer.pid
            if message.generation == self._generation:
                self.bound = message.bound
            self._watch(peer.pid)
            if self._latest is not None:
                peer.offer(self._latest[1])
        watcher = self.watcher
        if watcher is None:
            return
        match message:
            case Taken(generation=generation, revision=revision):
                if generation == self._generation:
                    peer.taken = max(peer.taken, revision)
                    if self._latest is not None and revision > self._latest[0]:
                        watcher.relay_is_ahead(revision)
            case Failed(identity=identity, reason=reason):
                watcher.relay_failed(identity, reason)
                return
            case Recovered(identity=identity):
                watcher.relay_recovered(identity)
                return
            case Draining():
                peer.is_draining = True
            case Hello():
                pass
        watcher.relays_changed()

    def _watch(self, pid: int) -> None:
        """Its end is told once, even where its connection ended long before."""
        if pid in self._processes:
            return
        try:
            fd = os.pidfd_open(pid)
        except OSError:  # it is gone, or of another namespace
            return
        self._processes[pid] = fd
        asyncio.get_running_loop().add_reader(fd, self._ended, pid)

    def _ended(self, pid: int) -> None:
        fd = self._processes.pop(pid)
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)
        if self.watcher is not None:
            self.watcher.process_ended()


class RelayPeer(asyncio.Protocol):
    """One connection. At most one table is on its way, and the latest waits: a slow reader costs no more than that."""

    def __init__(self, relays: Relays) -> None:
        self._relays = relays
        self._frames = Frames()
        self._transport: asyncio.Transport | None = None
        self._is_paused = False
        self._waiting: bytes | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self.hello: Hello | None = None
        self.pid = 0
        """As the kernel says."""
        self.taken = 0
        """The revision of the table that it has, of this generation."""
        self.is_draining = False

    @property
    def generation(self) -> int:
        return 0 if self.hello is None else self.hello.generation

    @property
    def slot(self) -> int:
        return 0 if self.hello is None else self.hello.slot

    @property
    def row(self) -> int:
        return 0 if self.hello is None else self.hello.row

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class
        self._transport = transport
        try:
            credentials = Credentials(transport.get_extra_info("socket"))
        except OSError:  # it is gone already
            transport.abort()
            return
        self.pid = credentials.pid
        if not credentials.is_ours:
            _LOG.warning("relays.sock: refused process %d of user %d", credentials.pid, credentials.uid)
            transport.abort()
        elif not self._relays.admit(self):
            transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                self._relays.handle(self, decode_from_relay(body))
        except BadFrame as error:
            _LOG.warning("relays.sock: process %d sent no frame (%s): its connection is closed", self.pid, error)
            self.abort()

    def pause_writing(self) -> None:
        self._is_paused = True
        self._stalled = asyncio.get_running_loop().call_later(STALLED_SECONDS, self._cut)

    def resume_writing(self) -> None:
        self._is_paused = False
        self._forgive()
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self.offer(waiting)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._forgive()
        self._relays.forget(self)

    def offer(self, table: bytes) -> None:
        if self._transport is None:
            return
        if self._is_paused:
            self._waiting = table
        else:
            self._transport.write(table)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _cut(self) -> None:
        _LOG.warning("relays.sock: process %d reads nothing: its connection is closed", self.pid)
        self.abort()

    def _forgive(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
