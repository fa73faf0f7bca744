"""For programs that serve by themselves: what `main(worker)` gets.

`async def main(worker)` gets an `AsyncWorker`; `def main(worker)` gets a `Worker`, which blocks. Both know who they
are and what is bound, say when they are ready, and are told when to drain. The process ends when `main` returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Any, cast

from handoff.core.messages import Boot, Opened, Ready, Receivers
from handoff.core.moves import MAXIMUM_DATA_BYTES, RAW, AnyState, RawState
from handoff.counters import ADOPTED, ADOPTING, CONNECTIONS, HEARTBEAT, MOVED, REFUSED, WorkerCounters
from handoff.mailbox import Unreadable, receive_letters
from handoff.pacing import end_pacing
from handoff.rights import has_headroom
from handoff.worker.accepting import Server
from handoff.worker.acceptors import Acceptors, fd_of
from handoff.worker.adopter import LETTERS_PER_TURN, Adopter, socket_of, sockets_of
from handoff.worker.balance import shares
from handoff.worker.collector import end_boot
from handoff.worker.context import Claims
from handoff.worker.foreign_slots import ForeignSlots
from handoff.worker.link import Link
from handoff.worker.mover import Mover
from handoff.worker.outbox import Outbox, Put
from handoff.worker.raw import Protocol, RawConnection, makes_movable
from handoff.worker.rebalancing import Rebalancing

ACCEPTS_BY_ITSELF = "is for ASGI, for WSGI, and for programs on asyncio that accept with worker.serve"
"""A worker must be able to accept for slots that nobody serves."""
MAXIMUM_HANDED_FDS = 16
_BEAT_SECONDS = 0.5
SENDERS_SECONDS = 2.0
"""How long workers may take to hear that nobody takes connections any more."""


class _Identity:
    """What both kinds of worker know."""

    def __init__(self, boot: Boot, link: Link, claims: Claims, counters: memoryview) -> None:
        self.name: str = boot.settings.name
        """The service's name."""
        self.generation: int = boot.generation
        self.label: str = boot.label
        """The operator's name for this version; may be empty."""
        self.slot: int = boot.slot
        """A stable number, from 0: the replacement of a worker has the same."""
        self.arguments: dict[str, Any] = boot.settings.arguments
        """The table `[arguments]` of the configuration this generation is pinned to."""
        self._boot = boot
        self._link = link
        self._claims = claims
        self._counters = counters
        self._is_ready = False
        self._is_closed_when_told = True
        """The program accepts by itself, and is taken to stop when it hears of a drain."""

    @property
    def listeners(self) -> Mapping[str, socket.socket]:
        """Listening, non-blocking sockets by name. Looking one up claims it; what is not claimed when the worker
        says that it is ready is closed in this process. Borrowed: never `shutdown` one, all workers share it."""
        return self._claims

    @property
    def draining(self) -> bool:
        """Take nothing new, finish what exists, and return from `main`."""
        self._link.read()
        return self._is_told_to_drain()

    def _is_told_to_drain(self) -> bool:
        if self._link.is_draining and self._is_closed_when_told:
            self._link.closed()
        return self._link.is_draining

    @property
    def drain_seconds(self) -> float | None:
        """Seconds left for the drain; None while serving."""
        deadline = self._link.drain_deadline
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    @property
    def ending_listeners(self) -> frozenset[str]:
        """Of a drain: those that nobody accepts from after it. Let in who is queued there, who would be reset."""
        return frozenset(self._link.ending_listeners)

    @property
    def is_orphan(self) -> bool:
        """Of a drain: the master is dead. Let in who is queued, and close the listeners: a new master binds anew."""
        return self._link.is_orphan

    @property
    def connections(self) -> int:
        """How many `handoff status` shows: set it when it changes. With `serve` it is counted for you."""
        return self._counters[CONNECTIONS]

    @connections.setter
    def connections(self, number: int) -> None:
        self._counters[CONNECTIONS] = number
        self._counters[ADOPTING] = 0

    def _say_ready(self, adopts: bool) -> None:
        assert not self._is_ready, "ready() is for once"
        self._is_ready = True
        unserved = self._claims.close_unclaimed()
        end_boot()
        end_pacing()
        self._link.send(Ready(interface="handoff", unserved=unserved, adopts=(RAW,) if adopts else ()))

    def _leave(self, number: int) -> None:
        """The first TERM drains; one during a drain ends the worker at once."""
        if self._link.is_draining:
            raise SystemExit(0)
        name = signal.Signals(number).name
        self._link.leave(f"the worker was sent {name}", self._boot.settings.drain_timeout_seconds)


class Worker(_Identity):
    """For a blocking program, typically a loop on `selectors`."""

    def __init__(self, boot: Boot, link: Link, claims: Claims, counters: WorkerCounters) -> None:
        super().__init__(boot, link, claims, counters.own)
        self._all_counters = counters
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(link.fileno(), select.EPOLLIN)
        self._epoll.register(self._wake_reader, select.EPOLLIN)
        self._mailbox = socket.socket(fileno=boot.mailbox_fd)
        self._mailbox.setblocking(False)
        self._reads_mailbox = False
        self._is_crowded = False
        """There was no room for the fds of another connection."""
        self._outbox = Outbox()
        self._full: list[socket.socket] = []
        """Writing ends that are watched for room."""
        self._given_to: list[int] = []
        """Mailboxes that are to get one connection each, so that all siblings have their share."""
        link.on_receivers = self._receivers_changed
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)

    def fileno(self) -> int:
        """Readable when the master has something to say, when there is something for `adopted`, or when there is room
        again after a `hand_over` that found none: register the worker in a selector, then call `wait(0)`."""
        return self._epoll.fileno()

    def ready(self, adopts: bool = False, tells_closed: bool = False) -> bool:
        """Say that everything works, and wait for the commit. True: accept from now on. False: return from `main`,
        this generation will not be live. `adopts`: the program takes connections over with `adopted()`.
        `tells_closed`: it calls `closed()` in a drain; else it is taken to accept nobody as soon as it hears of one."""
        self._is_closed_when_told = not tells_closed
        self._say_ready(adopts)
        self._link.read()
        while not self._link.is_open and not self._link.is_draining:
            self._poll(None)
        if self._link.is_draining:
            return False
        if adopts:
            self._reads_mailbox = True
            self._epoll.register(self._mailbox, select.EPOLLIN)
        self._link.send(Opened())
        return True

    def closed(self) -> None:
        """Of a drain: say that nobody is accepted here any more. The verdict of a reload waits for it, a second at
        most."""
        self._link.closed()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until a drain is asked for, or there is something for `adopted`, or for `timeout` seconds.

        Returns `draining`.
        """
        self._counters[ADOPTING] = 0
        if self.draining:
            self._poll(0)
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.draining:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                self._poll(0)
                break
            if self._poll(left):
                break
        return self.draining

    @property
    def can_hand_over(self) -> bool:
        """A drain is on, and another worker takes connections."""
        return self.draining and self._link.moves and self._outbox.takes(RAW)

    def hand_over(self, fds: Sequence[int], state: bytes = b"") -> bool:
        """Give a connection to another worker: its fds, 1 to 16, and what that worker is to know, at most 16 MiB.

        True: it is the other's now. Unregister your fds from the selector, then close them: the other way round epoll
        keeps a ghost. False: nobody takes it at this moment; serve on, and try again when the worker is readable, or
        after some 20 ms at the latest. Raises ValueError for too many fds or too large a state.
        """
        self._unwatch_full()
        if not 1 <= len(fds) <= MAXIMUM_HANDED_FDS:
            raise ValueError(f"hand_over: {len(fds)} fds; 1 to {MAXIMUM_HANDED_FDS}")
        mailbox = self._given_to.pop() if self._given_to else None
        match self._outbox.put(RAW, [(RawState(), state, fds)], mailbox):
            case Put.SENT:
                self._counters[MOVED] += 1
                return True
            case Put.REFUSED:
                raise ValueError(f"hand_over: a state of {len(state)} bytes; at most {MAXIMUM_DATA_BYTES}")
            case Put.FULL:
                self._full = self._outbox.writers(RAW)
                for writer in self._full:
                    self._epoll.register(writer, select.EPOLLOUT)
        return False

    @property
    def has_siblings(self) -> bool:
        """Other workers take connections from us. The worker is readable when that changes."""
        return self._outbox.takes(RAW)

    @property
    def is_crowded(self) -> bool:
        """There was no room for the fds of another connection, which waits: ask `adopted` now and then."""
        return self._is_crowded

    @property
    def has_unread(self) -> bool:
        """What was handed over, by us or by others, is not all adopted and counted (`connections`, or the next
        `wait`) by its receiver yet."""
        # In this order: who reads a mailbox says so before.
        return self._outbox.has_unread() or any(
            self._all_counters.read(info.row, ADOPTING) for info in self._outbox.receivers
        )

    def surplus(self) -> int:
        """How many connections are more than this worker's share, by the counts of all its siblings (`connections`).

        To be asked several times a second; the next so many calls of `hand_over` give to those who have too few.
        Mostly 0, and always in a drain, in which everything is to be handed over.
        """
        self._given_to = []
        self._link.read()
        if self._link.is_draining or not self._outbox.takes(RAW) or self.has_unread:
            return 0
        counts = {info.row: self._all_counters.read(info.row, CONNECTIONS) for info in self._outbox.receivers}
        counts[self._boot.counters_row] = self.connections
        plan = shares(counts, self._boot.counters_row)
        self._given_to = [info.mailbox for info in self._outbox.receivers for _ in range(plan.get(info.row, 0))]
        return len(self._given_to)

    def adopted(self) -> list[tuple[list[socket.socket], bytes]]:
        """Connections that other workers handed over: sockets, non-blocking, which are yours now, and their states.

        A few at once: ask again when the worker is readable; where fds have run out, now and then. A state is
        data, from a peer: check it. Never blocks.
        """
        found: list[tuple[list[socket.socket], bytes]] = []
        for fds, state in self.adopted_fds():
            if sockets := sockets_of(fds):
                found.append((sockets, state))
            else:
                self._counters[ADOPTED] -= 1
                self._counters[REFUSED] += 1
        return found

    @property
    def may_adopt(self) -> bool:
        """Connections may still come. When the service stops, until every other worker has heard of it."""
        return self._reads_mailbox

    def adopted_fds(self) -> list[tuple[list[int], bytes]]:
        """As `adopted`, where not all fds are sockets; close-on-exec, and yours."""
        found: list[tuple[list[int], bytes]] = []
        if self._reads_mailbox and self._link.is_draining and self._link.moves:
            self._stop_adopting()  # our replacement reads on, or the master
        self._counters[ADOPTING] = int(self._reads_mailbox)
        while self._reads_mailbox and len(found) < LETTERS_PER_TURN and self._has_room():
            try:
                letters = receive_letters(self._mailbox)
            except BlockingIOError:
                break
            except EOFError:  # the master closed the writing end; its message that we drain comes by another way
                self._stop_adopting()
                break
            except Unreadable as error:
                self._counters[REFUSED] += error.connections
                continue
            self._counters[ADOPTED] += len(letters)
            found += [(fds, state) for _, state, fds in letters]
        self._counters[ADOPTING] = int(bool(found))
        return found

    def _has_room(self) -> bool:
        """For the fds of one more. As long as there is none the mailbox makes nobody readable: it would stay so."""
        has_room = has_headroom(self._mailbox.fileno())
        if has_room == self._is_crowded:
            self._is_crowded = not has_room
            self._epoll.modify(self._mailbox, select.EPOLLIN if has_room else 0)
        return has_room

    def _receivers_changed(self, message: Receivers, fds: list[int]) -> None:
        self._unwatch_full()
        self._given_to = []
        self._outbox.update(message, fds)

    def _unwatch_full(self) -> None:
        for writer in self._full:
            self._epoll.unregister(writer)
        self._full = []

    def _stop_adopting(self) -> None:
        self._reads_mailbox = False
        self._epoll.unregister(self._mailbox)

    def _poll(self, timeout: float | None) -> bool:
        """Whether there is something for `adopted`."""
        ready = self._epoll.poll(timeout)
        if any(events & select.EPOLLOUT for _, events in ready):
            self._unwatch_full()
        with contextlib.suppress(BlockingIOError):
            self._wake_reader.recv(4096)
        if self._link.is_orphan:
            with contextlib.suppress(OSError):
                self._epoll.unregister(self._link.fileno())
        self._link.read()
        return any(fd == self._mailbox.fileno() for fd, _ in ready)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        self._leave(number)
        with contextlib.suppress(BlockingIOError):
            self._wake_writer.send(b"\0")


class AsyncWorker(_Identity):
    """For a program on asyncio; `await worker.serve(protocol_factory)` is all that most need."""

    def __init__(self, boot: Boot, link: Link, claims: Claims, counters: WorkerCounters) -> None:
        super().__init__(boot, link, claims, counters.own)
        self._changed = asyncio.Event()
        self._transports: set[asyncio.BaseTransport] = set()
        self._mover = Mover(counters.own)
        self._movable: dict[asyncio.BaseTransport, RawConnection] = {}
        self._rebalancing = Rebalancing(RAW, self._mover.outbox, counters, boot.counters_row, self._movable.values)
        self._adopting: set[asyncio.Task[Any]] = set()
        self._acceptors: Acceptors | None = None
        loop = asyncio.get_running_loop()
        link.on_change = self._link_changed
        link.on_receivers = self._mover.update
        self._foreign_slots = ForeignSlots(self._accept_from)
        link.on_also_accept = self._foreign_slots.update
        self._factories: dict[str, Callable[[], asyncio.Protocol]] = {}
        self._beat()
        loop.add_reader(link.fileno(), link.read)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._leave, number)

    def _link_changed(self) -> None:
        self._changed.set()
        if self._link.is_orphan:  # the end of the channel stays readable for ever
            asyncio.get_running_loop().remove_reader(self._link.fileno())

    def _beat(self) -> None:
        """Tells that the event loop turns."""
        self._counters[HEARTBEAT] += 1
        asyncio.get_running_loop().call_later(_BEAT_SECONDS, self._beat)

    async def ready(self) -> bool:
        """Say that everything works, and wait for the commit. True: accept from now on. False: return from `main`,
        this generation will not be live. Raises ValueError in listen-mode reuseport, which is for `serve`."""
        mode = self._boot.settings.listen_mode
        if mode != "shared":
            raise ValueError(f"listen-mode {mode}: {ACCEPTS_BY_ITSELF}")
        return await self._ready(adopts=False)

    async def _ready(self, adopts: bool) -> bool:
        self._say_ready(adopts)
        await self._until(lambda: self._link.is_open or self._link.is_draining)
        if self._link.is_draining:
            return False
        self._link.send(Opened())
        return True

    async def drained(self) -> None:
        """Wait until a drain is asked for."""
        await self._until(self._is_told_to_drain)

    async def serve(
        self, protocol_factory: Callable[[], asyncio.Protocol], listeners: Iterable[str] | None = None
    ) -> None:
        """Say ready, accept on the named listeners (default: all) after the commit, and at a drain wait, under its
        deadline, until every connection is closed; what is left then is aborted.

        Where the factory is a subclass of handoff.Protocol, connections move instead, as soon as their protocols let
        them. The protocol's instances need a `__dict__`: their connection_made and connection_lost are watched.
        """
        sockets = {name: self.listeners[name] for name in (listeners if listeners is not None else list(self._claims))}
        for name, listener in sockets.items():
            if listener.type != socket.SOCK_STREAM:
                raise ValueError(f"serve: listener {name} is UDP; give it to loop.create_datagram_endpoint(sock=…)")
        moves = makes_movable(protocol_factory)
        self._is_closed_when_told = False
        self._factories = {name: partial(self._make, protocol_factory, name) for name in sockets}
        if not await self._ready(adopts=moves):
            return
        loop = asyncio.get_running_loop()
        backlog = self._boot.settings.backlog

        async def open_server(name: str, listener: socket.socket) -> Server:
            return await loop.create_server(self._factories[name], sock=listener, backlog=backlog)

        acceptors = self._acceptors = Acceptors(sockets, backlog, open_server, self._take)
        await acceptors.open()
        adopter = Adopter(socket.socket(fileno=self._boot.mailbox_fd), self._adopt, self._counters)
        if moves:
            adopter.start()
            self._rebalancing.begin()
        await self.drained()
        self._rebalancing.end()
        if moves and self._link.moves:
            adopter.stop()  # our replacement reads on, or the master
        await acceptors.stop(self._link.ending_listeners, await self._foreign_slots.close())
        self._link.closed()
        await self._until_empty()
        if moves and not self._link.moves and not self._link.is_orphan:
            await self._until_nobody_sends(adopter)
        for transport in list(self._transports):
            getattr(transport, "abort", transport.close)()
        await asyncio.sleep(0)  # connection_lost of what was aborted is called in the next turn

    async def _until_nobody_sends(self, adopter: Adopter) -> None:
        """The service stops: others may have handed over to us before they heard of it."""
        adopter.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(SENDERS_SECONDS, self.drain_seconds or 0.0)):
                await adopter.ended.wait()
        await self._until_empty()

    async def _until_empty(self) -> None:
        """Until no connection is left, or the deadline. They move where somebody takes them."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.drain_seconds) as limit:
                while self._transports or self._adopting:
                    moves = self._link.moves and self._mover.outbox.takes(RAW)
                    for connection in list(self._movable.values()):
                        if moves:
                            connection.begin_move()
                        else:
                            connection.cancel_move()
                    await self._changed.wait()
                    self._changed.clear()
                    left = self.drain_seconds
                    if left is not None:  # a later message may have brought the deadline nearer
                        limit.reschedule(asyncio.get_running_loop().time() + left)

    async def _accept_from(self, name: str, listener: socket.socket) -> Server | None:
        """None: the program does not serve a listener of this name."""
        if self._acceptors is None or name not in self._factories:
            return None
        return await self._acceptors.serve(name, listener)

    def _make(self, protocol_factory: Callable[[], asyncio.Protocol], listener: str) -> asyncio.Protocol:
        return self._watched(protocol_factory(), listener)

    def _adopt(self, state: AnyState, data: bytes, fds: list[int]) -> None:
        """Take over a connection; its fds are ours. Raises Unreadable."""
        connection = socket_of(state, fds)
        if not isinstance(state, RawState) or state.listener not in self._factories:
            connection.close()
            raise Unreadable(f"no such listener here, or no connection of this kind: {state}")
        protocol: Any = self._factories[state.listener]()
        made = protocol.connection_made

        def connection_made(transport: asyncio.BaseTransport) -> None:
            try:
                made(transport)
                protocol.attach(data)
            except Exception:  # another release's state, perhaps; nobody serves this connection
                logging.getLogger("handoff").exception("attach failed; the connection is closed")
                self._counters[ADOPTED] -= 1
                self._counters[REFUSED] += 1
                cast("asyncio.Transport", transport).abort()

        protocol.connection_made = connection_made
        self._serve_one(lambda: protocol, connection)

    def _take(self, name: str, connection: socket.socket) -> None:
        """Serve a connection that was accepted just now; it is ours."""
        self._serve_one(self._factories[name], connection)

    def _serve_one(self, factory: Callable[[], asyncio.Protocol], connection: socket.socket) -> None:
        """A drain waits for it."""
        task = asyncio.ensure_future(asyncio.get_running_loop().connect_accepted_socket(factory, connection))
        self._adopting.add(task)
        task.add_done_callback(self._adopted)

    def _adopted(self, task: asyncio.Task[Any]) -> None:
        self._adopting.discard(task)
        self._changed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            logging.getLogger("handoff").warning("a connection could not be taken over: %s", error)

    def _watched(self, protocol: asyncio.Protocol, listener: str) -> asyncio.Protocol:
        """The same protocol, its two ends reported to us; the data path is untouched."""
        watched: Any = protocol
        made, lost = protocol.connection_made, protocol.connection_lost
        transports: list[asyncio.BaseTransport] = []

        def connection_made(transport: asyncio.BaseTransport) -> None:
            transports.append(transport)
            self._transports.add(transport)
            self._counters[CONNECTIONS] = len(self._transports)
            if self._acceptors is not None and fd_of(transport) >= self._acceptors.crowded_from:
                self._acceptors.crowded()
            made(transport)
            if isinstance(protocol, Protocol):
                self._movable[transport] = RawConnection(
                    protocol, cast("asyncio.Transport", transport), listener, self._mover
                )
                if self._link.is_draining:
                    self._changed.set()

        def connection_lost(error: Exception | None) -> None:
            self._transports.difference_update(transports)
            for transport in transports:
                self._movable.pop(transport, None)
            self._counters[CONNECTIONS] = len(self._transports)
            if self._link.is_draining:
                self._changed.set()
            lost(error)

        watched.connection_made, watched.connection_lost = connection_made, connection_lost
        return protocol

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()
            self._changed.clear()
