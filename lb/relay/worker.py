"""The program of a relay worker: `main(worker)`, run by handoff as the workers of a balancer's service."""

from __future__ import annotations

import gc
import ipaddress
import math
import os
import socket
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path

import msgspec

from handoff import Worker
from handoff.addresses import parse_bind
from lb.control.stored import initial_table
from lb.core.closing import due_now
from lb.core.model import Balancer
from lb.core.table import Table
from lb.core.wire import PAGE_NAME, Hello
from lb.own_addresses import bound_addresses, is_vague, refuse_own_backends
from lb.page import Page
from lb.relay.acceptor import Acceptor
from lb.relay.access_log import AccessLog
from lb.relay.engine import Engine
from lb.relay.link import Link
from lb.relay.loop import READ, Loop
from lb.relay.moving import RETRY_SECONDS, Moving
from lb.relay.silence import notice_silence

SPREAD_SECONDS = 5.0
"""What is left near the deadline of a drain is closed over so long, and not in one storm."""
CLOSING_TICK_SECONDS = 0.1
SENDERS_SECONDS = 2.0
"""How long the others may take to hear that nobody takes connections any more."""


class Arguments(msgspec.Struct, frozen=True, kw_only=True):
    """`worker.arguments`, as `lb.describe` prints them."""

    balancer: Balancer
    shown: str
    state: str


def main(worker: Worker) -> None:
    """Relays until the drain is done."""
    arguments = msgspec.convert(worker.arguments, Arguments)
    directory = Path(os.environ["HANDOFF_RUNTIME_DIRECTORY"])
    page = Page(directory / PAGE_NAME)
    page.take_row()
    first_table = partial(initial_table, arguments.balancer, worker.generation, directory, Path(arguments.state))
    first_table()  # what is wrong with it fails the boot, as does what is wrong with the listeners below
    names = {service.name for service in arguments.balancer.services}
    listeners = {name: worker.listeners[name] for name in worker.listeners if _service_of(name) in names}
    refuse_own_backends(arguments.balancer, ".", bound_addresses(_vague(arguments.balancer, listeners)))
    if worker.ready(adopts=True, tells_closed=True):
        gc.freeze()  # connections leave no cycles: what is looked through again and again is what lives long
        gc.set_threshold(50_000, 50, 50)
        relays = RelayWorker(
            worker, page, first_table, directory, arguments.balancer, bound_addresses(listeners.values())
        )
        relays.serve(listeners)
    page.close()


def _vague(balancer: Balancer, listeners: Mapping[str, socket.socket]) -> list[socket.socket]:
    """Those of which the file does not say where they are; the others were judged when it was read."""
    typed = {f"{one.name}.{number}": text for one in balancer.services for number, text in enumerate(one.listen)}
    return [listener for name, listener in listeners.items() if is_vague(parse_bind(typed[name]))]


def _service_of(listener: str) -> str:
    """Listeners are called SERVICE.N."""
    return listener.rpartition(".")[0]


class RelayWorker:
    """The engine, its link to the controller, and the drain."""

    def __init__(
        self,
        worker: Worker,
        page: Page,
        first_table: Callable[[], Table],
        directory: Path,
        balancer: Balancer,
        bound: tuple[str, ...] = (),
    ) -> None:
        """`first_table`: what stands in the files, while no controller of this generation has sent a table. `bound`:
        where the listeners are."""
        table = first_table()
        assert page.row is not None
        self._worker = worker
        self._is_draining = False
        self._listeners: Mapping[str, socket.socket] = {}
        self._acceptors: dict[str, Acceptor] = {}
        """By the names of listeners: of those that we accept from."""
        self._loop = Loop()
        self._log = AccessLog(sys.stdout.fileno()) if balancer.access_log else None
        self._unready_seconds = balancer.unready_seconds
        hello = Hello(pid=os.getpid(), generation=worker.generation, slot=worker.slot, row=page.row, bound=bound)
        self._link = Link(
            self._loop,
            directory,
            hello,
            table,
            on_table=self._take,
            on_older=lambda: self._take(first_table()),
        )
        self.engine = Engine(self._loop, page, table, self._link, self._log)
        self._moving = Moving(worker, self.engine, self._loop, self._service_at, self._heard)
        self._link.open()

    def serve(self, listeners: Mapping[str, socket.socket]) -> None:
        """Accept until a drain, and go on until its end."""
        loop, worker = self._loop, self._worker
        self._listeners = listeners
        self._notice_silence()
        self._acceptors = {
            name: Acceptor(listener, loop, partial(self.engine.let_in, _service_of(name)))
            for name, listener in listeners.items()
        }
        for acceptor in self._acceptors.values():
            acceptor.open()
        loop.watch(worker.fileno(), READ, self._worker_event)
        self._moving.may_balance()
        self._heard()
        while not self._is_draining:
            self._turn(None)
        if worker.is_orphan:
            self._close_listeners()
        self._link.draining()
        ending = frozenset(self._acceptors) & worker.ending_listeners
        self._stop_accepting(self._acceptors.keys() - ending)
        worker.closed()
        if ending:
            self._be_unready()
        self._stop_accepting(ending)
        self._drain({_service_of(name) for name in ending})
        self._link.close()
        loop.shut_down()
        if self._log is not None:
            self._log.close()

    def _stop_accepting(self, names: Iterable[str]) -> None:
        """Who is queued where nobody accepts any more is let in before."""
        for name in names:
            acceptor = self._acceptors.pop(name, None)
            if acceptor is not None:
                acceptor.close()
                if name in self._worker.ending_listeners or self._worker.is_orphan:
                    acceptor.accept_queued()

    def _close_listeners(self) -> None:
        """The master is dead: its addresses are free for a new one when the last of us has closed them."""
        self._stop_accepting(list(self._acceptors))
        for listener in self._listeners.values():
            listener.close()
        self._listeners = {}

    def _take(self, table: Table) -> None:
        self.engine.take(table)
        self._notice_silence()

    def _service_at(self, client: socket.socket) -> str | None:
        address = client.getsockname()
        for name, listener in self._listeners.items():
            own = listener.getsockname()
            is_anywhere = isinstance(own, tuple) and own[0] in ("0.0.0.0", "::") and own[1:2] == address[1:2]
            if listener.family == client.family and (own == address or is_anywhere):
                return _service_of(name)
        return None

    def _notice_silence(self) -> None:
        """Of clients that come from now on, but for those on this machine."""
        for name, listener in self._listeners.items():
            route = self.engine.table.routes.get(_service_of(name))
            if route is None or listener.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if not ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback:
                notice_silence(listener, route.timeouts.silent_seconds)

    def _turn(self, timeout: float | None) -> None:
        self._loop.turn(timeout)
        self._moving.show()
        if self._log is not None:
            self._log.flush()

    def _heard(self) -> None:
        """Somebody has read what the master says: nobody is woken for it again."""
        self._is_draining = self._worker.drain_seconds is not None

    def _worker_event(self, _mask: int) -> None:
        self._worker.wait(0)
        self._heard()
        if self._worker.is_orphan:
            self._close_listeners()
        self._moving.adopt_some()
        self._moving.may_balance()

    def _be_unready(self) -> None:
        """The service stops: whoever asks `/readyz` hears that first, and sends nobody any more."""
        seconds = min(self._unready_seconds, (self._worker.drain_seconds or 0.0) / 2)
        until = self._loop.now + seconds
        while (left := until - self._loop.now) > 0 and self._worker.drain_seconds:
            self._turn(left)

    def _drain(self, ending: Collection[str]) -> None:
        """Until all have moved or ended; what has not near the deadline is closed, spread over some time."""
        began_at = close_at = self._loop.now
        spread = min(SPREAD_SECONDS, (self._worker.drain_seconds or 0.0) / 2)
        while self._is_needed(began_at):
            left = self._worker.drain_seconds or 0.0
            if self._moving.hand_over_some(ending):
                self._turn(0)
            elif left > spread:
                self._turn(min(left - spread, self._patience_seconds()))
            else:
                close_at = self._close_due(close_at, left)
                self._turn(min(close_at - self._loop.now, self._patience_seconds()))

    def _close_due(self, close_at: float, left: float) -> float:
        """Close those whose turn it is, from `close_at` on. Returns when the next are due."""
        now = self._loop.now
        if now < close_at and left > 0:
            return min(close_at, now + left)
        share, pause_seconds = due_now(self.engine.connections + self.engine.waiting, left, CLOSING_TICK_SECONDS)
        self.engine.close_some(share)
        return now + pause_seconds

    def _patience_seconds(self) -> float:
        """How long nothing may happen before we look again."""
        if self._worker.can_hand_over or not self._moving.is_settled:
            return RETRY_SECONDS
        return SENDERS_SECONDS if self._worker.may_adopt else math.inf

    def _is_needed(self, began_at: float) -> bool:
        """There are connections here, others may still send theirs (the service stops), or ours are on their way."""
        if self.engine.connections or self.engine.waiting or not self._moving.is_settled:
            return True
        return self._worker.may_adopt and self._loop.now < began_at + SENDERS_SECONDS
