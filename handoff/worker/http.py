"""Serving an ASGI application: start-up, warm-up and check, accepting after the commit, and the drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from email.utils import formatdate
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.lifespan.off import LifespanOff
from uvicorn.lifespan.on import LifespanOn
from uvicorn.middleware.asgi2 import ASGI2Middleware

from handoff.core.messages import MAXIMUM_HOLDS, Boot, Hold, Holds, Opened, Progress, Ready, cut
from handoff.core.moves import HTTP, WEBSOCKET, AnyState, HTTPState, WebSocketState
from handoff.counters import HEARTBEAT, WorkerCounters
from handoff.mailbox import Unreadable
from handoff.pacing import end_pacing
from handoff.worker.accepting import Server
from handoff.worker.acceptors import Acceptors
from handoff.worker.adopter import Adopter, socket_of
from handoff.worker.check import request_self
from handoff.worker.collector import end_boot
from handoff.worker.foreign_slots import ForeignSlots
from handoff.worker.link import Link
from handoff.worker.load import BootFailure, takes_only_scope
from handoff.worker.logs import BAD_CONFIGURATION, log_config
from handoff.worker.measured import MeasuredHTTPProtocol
from handoff.worker.newcomers import Newcomers
from handoff.worker.protocol import HTTPProtocol
from handoff.worker.proxied import Rules
from handoff.worker.rebalancing import Rebalancing
from handoff.worker.state import WorkerServerState
from handoff.worker.tested import can_move
from handoff.worker.timeout import RequestTimeout
from handoff.worker.tls import server_context
from handoff.worker.websocket import WebSocketProtocol

LINGER_SECONDS = 2.0
"""How long an idle kept-alive connection may still send a request after a drain began."""
_HOPELESS_SECONDS = 2 * LINGER_SECONDS
"""So near the deadline nobody is hoped for who would take connections: they linger, and end gently."""
CUT_OFF_SECONDS = 0.5
"""After the deadline: for the close frames of WebSockets and the cancelled tasks."""
SENT_PER_TURN = 32
"""How many connections are handed over in one turn of the loop, so that the others' clients do not wait."""
_TICK_SECONDS = 0.5

Application = Callable[..., Any]


class HTTPService:
    """One worker's HTTP service on the running event loop. Borrows the link and the listeners."""

    def __init__(
        self,
        application: Application,
        boot: Boot,
        interface: str,
        link: Link,
        listeners: Mapping[str, socket.socket],
        counters: WorkerCounters,
    ) -> None:
        self._settings = boot.settings
        self._interface = interface
        self._link = link
        self._config = uvicorn_config(application, boot, interface)
        self._counters, self._row = counters, boot.counters_row
        self._state = WorkerServerState(counters.own)
        self._adopter = Adopter(socket.socket(fileno=boot.mailbox_fd), self._adopt, counters.own)
        self._adopting: set[asyncio.Task[Any]] = set()
        self._adopts = _kinds(boot)
        self._state.hands_websockets_over = WEBSOCKET in self._adopts
        self._rebalancing = Rebalancing(HTTP, self._state.mover.outbox, counters, self._row, self._movable)
        self._http = MeasuredHTTPProtocol if boot.measures else HTTPProtocol
        self._changed = asyncio.Event()
        rules = None
        if self._settings.proxy_protocol != "off":
            rules = Rules(self._settings.proxy_protocol, self._settings.proxy_from)
        self._newcomers = Newcomers(rules, self._config.ssl, self._protocol)
        open_server = None if self._newcomers.are_due else self._open_server
        self._acceptors = Acceptors(listeners, self._settings.backlog, open_server, self._take_raw)
        self._state.crowded_from, self._state.on_crowded = self._acceptors.crowded_from, self._acceptors.crowded
        self._foreign_slots = ForeignSlots(self._acceptors.serve)

    async def run(self) -> None:
        """Returns when the drain has ended. Raises BootFailure."""
        loop = asyncio.get_running_loop()
        self._link.on_change = self._link_changed
        self._link.on_report = self._report
        self._link.on_receivers = self._state.mover.update
        self._link.on_also_accept = self._foreign_slots.update
        loop.add_reader(self._link.fileno(), self._link.read)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._terminated, number)
        self._lifespan = self._config.lifespan_class(self._config)
        await self._unless_drained(self._start())
        await self._until(lambda: self._link.is_open or self._link.is_draining)
        if not self._link.is_draining:
            await self._open()
            await self._until(lambda: self._link.is_draining)
        await self._drain()
        await self._lifespan.shutdown()

    def _link_changed(self) -> None:
        self._changed.set()
        if self._link.is_orphan:  # the end of the channel stays readable for ever
            asyncio.get_running_loop().remove_reader(self._link.fileno())

    # --- starting ---------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        self._link.send(Progress(step="running the application's lifespan start-up"))
        await self._start_lifespan()
        self._tick()
        for path in self._settings.warm_up:
            self._link.send(Progress(step=f"warming up with {path}"))
            await request_self(self._protocol_of_check, path, "warm-up", self._settings.check_timeout_seconds)
        if self._settings.check is not None:
            self._link.send(Progress(step=f"checking {self._settings.check}"))
            await request_self(
                self._protocol_of_check, self._settings.check, "check", self._settings.check_timeout_seconds
            )
        self._state.total_requests = 0
        end_boot()
        end_pacing()
        self._link.send(Ready(interface=self._interface, adopts=self._adopts))

    async def _start_lifespan(self) -> None:
        errors = _ErrorCollector()
        logger = logging.getLogger("uvicorn.error")
        level = logger.level
        logger.addHandler(errors)
        logger.setLevel(logging.WARNING)  # its steps are in the master's log
        try:
            await self._lifespan.startup()
        finally:
            logger.setLevel(level)
            logger.removeHandler(errors)
        if self._lifespan.should_exit:
            reason, trace = errors.summary()
            raise BootFailure(f"the application's lifespan start-up failed: {reason}", trace)

    async def _unless_drained(self, work: Any) -> None:
        """Do the work, but give it up when the generation is dropped meanwhile."""
        task = asyncio.ensure_future(work)
        while not task.done():
            waiter = asyncio.ensure_future(self._changed.wait())
            await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
            waiter.cancel()
            self._changed.clear()
            if self._link.is_draining and not task.done():
                raise SystemExit(0)
        task.result()

    def _protocol(self, adopted: tuple[HTTPState, bytes] | None = None) -> HTTPProtocol:
        return self._http(self._config, self._state, self._lifespan.state, adopted=adopted)

    def _protocol_of_check(self) -> HTTPProtocol:
        """For requests to ourselves: no client's, so neither the counts nor the access log have them."""
        protocol = HTTPProtocol(self._config, self._state, self._lifespan.state)
        protocol.access_log = False
        return protocol

    # --- serving ----------------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        await self._acceptors.open()
        self._adopter.start()
        self._link.send(Opened())
        if self._adopts:
            self._rebalancing.begin()

    async def _open_server(self, _name: str, listener: socket.socket) -> Server:
        loop, backlog = asyncio.get_running_loop(), self._settings.backlog
        return await loop.create_server(self._protocol, sock=listener, backlog=backlog)

    def _take_raw(self, _name: str, connection: socket.socket) -> None:
        """Serve a connection that was accepted just now; it is ours. A drain waits for it, as for one adopted."""
        task = asyncio.ensure_future(self._newcomers.begin(connection))
        self._adopting.add(task)
        task.add_done_callback(self._adopted)

    def _adopt(self, state: AnyState, data: bytes, fds: list[int]) -> None:
        """Take over a connection; its fds are ours. Raises Unreadable."""
        if fds and fds[0] >= self._state.crowded_from:
            self._state.on_crowded()
        connection = socket_of(state, fds)
        protocol: HTTPProtocol | WebSocketProtocol
        if isinstance(state, HTTPState):
            protocol = self._protocol((state, data))
        elif isinstance(state, WebSocketState) and WEBSOCKET in self._adopts:
            protocol = WebSocketProtocol(self._config, self._state, self._lifespan.state, adopted=(state, data))
        else:
            connection.close()
            raise Unreadable(f"a connection that is not taken here: {state}")
        loop = asyncio.get_running_loop()
        task = loop.create_task(loop.connect_accepted_socket(lambda: protocol, connection))
        self._adopting.add(task)
        task.add_done_callback(self._adopted)

    def _adopted(self, task: asyncio.Task[Any]) -> None:
        self._adopting.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logging.getLogger("uvicorn.error").warning("a connection could not be taken over: %s", error)

    def _tick(self) -> None:
        """The Date header, the counters, and the limit of requests: twice a second."""
        date = [(b"date", formatdate(time.time(), usegmt=True).encode())] if self._config.date_header else []
        self._state.default_headers = date + self._config.encoded_headers
        self._state.publish()
        self._counters.own[HEARTBEAT] += 1
        now = asyncio.get_running_loop().time()
        for connection in self._state.connections:
            _ours(connection).observe(now)
        limit = self._config.limit_max_requests
        if limit is not None and self._state.total_requests >= limit:
            self._link.leave(f"served {limit} requests", self._settings.drain_timeout_seconds)
        asyncio.get_running_loop().call_later(_TICK_SECONDS, self._tick)

    def _movable(self) -> list[HTTPProtocol]:
        """Quiet ones first. No WebSockets: for a move their application's task has to end, in its own time."""
        connections = [one for one in self._state.connections if isinstance(one, HTTPProtocol)]
        return sorted((one for one in connections if one.is_movable), key=HTTPProtocol.is_busy)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()
            self._changed.clear()

    def _terminated(self, number: signal.Signals) -> None:
        """The first TERM drains; one during a drain ends the worker at once."""
        if self._link.is_draining:
            raise SystemExit(0)
        self._link.leave(f"the worker was sent {number.name}", self._settings.drain_timeout_seconds)

    # --- draining ---------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        state = self._state
        self._rebalancing.end()
        state.is_draining = True
        state.linger_seconds = min(LINGER_SECONDS, self._remaining())
        if self._link.moves:
            self._adopter.stop()  # our replacement reads on, or the master
        foreign = await self._foreign_slots.close()
        # Together: who sees that nobody accepts here any more also sees its request announce the end.
        await asyncio.gather(self._stop_accepting(foreign), self._send_away())
        await self._until_idle()
        if not self._link.moves and self._adopts and not self._link.is_orphan:
            await self._until_nobody_sends()
        if state.connections or state.tasks:
            await self._cut_off()

    async def _stop_accepting(self, foreign: Sequence[tuple[str, socket.socket, Server]]) -> None:
        await self._acceptors.stop(self._link.ending_listeners, foreign)
        self._link.closed()

    async def _until_nobody_sends(self) -> None:
        """The service stops: others may have handed over to us before they heard of it."""
        self._adopter.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(LINGER_SECONDS, self._remaining())):
                await self._adopter.ended.wait()
        await self._until_idle()

    def _remaining(self) -> float:
        deadline = self._link.drain_deadline
        assert deadline is not None
        return max(0.0, deadline - time.monotonic())

    async def _until_idle(self) -> None:
        """Until no connection and no task is left, or the deadline, which a later message may bring nearer."""
        while not self._is_idle() and self._remaining() > 0:
            self._state.emptied.clear()
            self._changed.clear()
            await self._send_away()
            if self._is_idle():
                return
            waiters: set[asyncio.Future[Any]] = {asyncio.ensure_future(self._changed.wait())}
            if self._state.connections or self._adopting:
                waiters.add(asyncio.ensure_future(self._state.emptied.wait()))
                waiters |= self._adopting
            else:
                waiters.add(asyncio.ensure_future(asyncio.wait(set(self._state.tasks))))
            await asyncio.wait(waiters, timeout=self._patience(), return_when=asyncio.FIRST_COMPLETED)
            for waiter in waiters - self._adopting:
                waiter.cancel()

    def _is_idle(self) -> bool:
        return not (self._state.connections or self._state.tasks or self._adopting)

    async def _send_away(self) -> None:
        """Connections move where somebody takes them; otherwise they end here, when nobody can be hoped for."""
        state, outbox = self._state, self._state.mover.outbox
        is_hopeful = self._link.moves and bool(self._adopts) and self._remaining() > _HOPELESS_SECONDS
        if self._link.moves and self._adopts and outbox.takes(HTTP):
            state.leave = HTTPProtocol.begin_move
        elif is_hopeful and not outbox.receivers:
            state.leave = HTTPProtocol.cancel_move  # nobody yet, or nobody now: serve on
        else:
            state.leave = HTTPProtocol.begin_drain
        # Taken out one by one: thousands that are let go of together at the end would take the loop 10 ms.
        waiting = deque(sorted(map(_ours, state.connections), key=_is_idle))
        for number in range(len(waiting)):
            one = waiting.popleft()
            if number % SENT_PER_TURN == SENT_PER_TURN - 1:
                await asyncio.sleep(0)
                if state.leave is HTTPProtocol.begin_move and not await self._has_room():
                    return
            if isinstance(one, HTTPProtocol):
                state.leave(one)
            elif self._link.moves and outbox.takes(WEBSOCKET):
                one.begin_move()
            else:
                one.begin_drain()

    async def _has_room(self) -> bool:
        """Idle connections are served on until it is their turn to move: among thousands that takes a while. False:
        something changed meanwhile, or the time is over, and everything is to be looked at again."""
        room = self._state.mover.room(HTTP)
        if not room.is_set():
            waiters = [asyncio.ensure_future(self._changed.wait()), asyncio.ensure_future(room.wait())]
            await asyncio.wait(waiters, timeout=self._remaining(), return_when=asyncio.FIRST_COMPLETED)
            for waiter in waiters:
                waiter.cancel()
        return room.is_set() and not self._changed.is_set()

    def _patience(self) -> float:
        """How long to wait for a change: until the deadline, or until receivers are not hoped for any more."""
        remaining = self._remaining()
        if self._state.leave is HTTPProtocol.cancel_move and remaining > _HOPELESS_SECONDS:
            return remaining - _HOPELESS_SECONDS
        return remaining

    async def _cut_off(self) -> None:
        for connection in list(self._state.connections):
            _ours(connection).cut_off()
        tasks = set(self._state.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CUT_OFF_SECONDS)

    def _report(self, request: int) -> Holds:
        now = asyncio.get_running_loop().time()
        holds = [hold for connection in self._state.connections if (hold := _ours(connection).hold(now)) is not None]
        idle_tasks = len(self._state.tasks) - sum(hold.kind in ("request", "websocket") for hold in holds)
        holds += self._newcomers.holds(now)
        holds += [Hold("task", "", "runs on after its response", 0.0)] * max(0, idle_tasks)
        holds.sort(key=lambda hold: -hold.age_seconds)
        return Holds(request=request, total=len(holds), holds=tuple(holds[:MAXIMUM_HOLDS]))


class _ErrorCollector(logging.Handler):
    """Keeps what uvicorn's lifespan logs as errors: the reason of a failed start-up is nowhere else."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().strip()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        self._messages.append(text)

    def summary(self) -> tuple[str, str]:
        """(the last line of the first message, all of it)."""
        trace = self._messages[0] if self._messages else ""
        lines = [line for line in trace.splitlines() if line.strip()]
        return (lines[-1].strip() if lines else "no reason given"), cut(trace if len(lines) > 1 else "")


def _is_idle(connection: HTTPProtocol | WebSocketProtocol) -> bool:
    return isinstance(connection, HTTPProtocol) and not connection.is_busy()


def _ours(connection: object) -> HTTPProtocol | WebSocketProtocol:
    return cast("HTTPProtocol | WebSocketProtocol", connection)


def uvicorn_config(application: Application, boot: Boot, interface: str) -> Config:
    """uvicorn's configuration, loaded. Raises BootFailure for settings that uvicorn does not take."""
    settings = boot.settings
    if takes_only_scope(application):
        application = ASGI2Middleware(application)  # type: ignore[arg-type]  # any callable with this form
    if settings.request_timeout_seconds is not None:
        application = RequestTimeout(application, settings.request_timeout_seconds)
    headers = list(settings.headers)
    if settings.generation_header:
        headers.append(("handoff-generation", str(boot.generation)))
    try:
        config = Config(
            application,
            **settings.uvicorn,
            http=HTTPProtocol,
            ws="none" if interface == "wsgi" else WebSocketProtocol,
            interface="asgi3",
            log_config=log_config(boot),
            access_log=settings.access_log,
            forwarded_allow_ips=settings.forwarded_allow_ips,
            root_path=settings.root_path,
            limit_concurrency=settings.limit_concurrency,
            workers=1,  # else it looks at WEB_CONCURRENCY by itself
            backlog=settings.backlog,
            timeout_keep_alive=cast("int", settings.keep_alive_seconds),
            headers=headers,
        )
        config.load()
        config.ssl = server_context(settings, boot.tls) or config.ssl
    except BAD_CONFIGURATION as error:
        raise BootFailure(f"uvicorn does not take these settings: {error}") from None
    assert config.lifespan_class in (LifespanOn, LifespanOff)
    return config


def _kinds(boot: Boot) -> tuple[str, ...]:
    """What may move here."""
    if not can_move(boot.slot):
        return ()
    return (HTTP, WEBSOCKET) if boot.settings.websockets == "hand-over" else (HTTP,)
