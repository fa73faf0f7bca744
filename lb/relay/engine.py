"""A relay worker's connections: let in, relayed, counted and logged, closed when a backend is to be empty."""

from __future__ import annotations

import logging
import random
import socket
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

import msgspec

from handoff.core.proxy_protocol import Address
from handoff.worker.proxied import Rules
from lb.core.choice import plain_address
from lb.core.client_hello import ClientHello
from lb.core.closing import due_now
from lb.core.table import Endpoint, Route, Table
from lb.page import CURRENT, RECEIVED_BYTES, RESET, SENT_BYTES, TOTAL, Page
from lb.relay import connecting
from lb.relay.access_log import logged
from lb.relay.attempt import Attempt
from lb.relay.dispatcher import RETRY_SECONDS, Dispatcher, Nobody
from lb.relay.letters import AttemptLetter, RelayLetter
from lb.relay.loop import Loop
from lb.relay.relay import Closed, Limits, Relay, reset_at_close
from lb.relay.targets import Target, Targets

CLOSING_TICK_SECONDS = 0.05
CLIENTS_FIRST = 100
"""So many clients in a row that said something before their server did: the next one will, too."""

_LOG = logging.getLogger("handoff.lb")


class Listening(Protocol):
    """Who hears of backends that cannot be connected to."""

    def failed(self, identity: str, reason: str) -> None: ...

    def recovered(self, identity: str) -> None: ...


class AccessLog(Protocol):
    def ended(self, attempt: Attempt, service: str, side: str, reason: str, is_late: bool, seconds: float) -> None: ...

    def relayed(self, context: Context, closed: Closed, seconds: float) -> None: ...


class Service:
    """What the engine keeps for one service."""

    __slots__ = ("clients_first", "dispatcher", "is_plain", "limits", "name", "rules")

    def __init__(self, name: str, dispatcher: Dispatcher) -> None:
        self.name = name
        self.dispatcher = dispatcher
        self.clients_first = 0
        """Clients in a row, the newest ones, that spoke before their server did."""
        self.take(dispatcher.route)

    def take(self, route: Route) -> None:
        timeouts = route.timeouts
        self.limits = Limits(
            timeouts.idle_seconds, timeouts.fin_seconds, timeouts.first_byte_seconds, timeouts.tunnel_seconds
        )
        self.rules = None if route.accept_proxy == "off" else Rules(route.accept_proxy, route.proxy_from)
        reads_first = self.rules is not None or self.dispatcher.reads_hello
        self.is_plain = not reads_first and route.per_source is None and route.send_proxy == "off"
        """A client is connected to a backend, and nothing else is to be done."""


class Context(msgspec.Struct, frozen=True):
    """What is known of a relay, for its end."""

    service: Service
    target: Target
    counted_as: str | None
    source: Address | None
    """Only where it is logged."""
    began_at: float
    hello: ClientHello | None = None
    """The same."""


class Engine:
    """Owns all sockets of clients and backends, and what is known of the backends."""

    def __init__(
        self, loop: Loop, page: Page, table: Table, listening: Listening, access_log: AccessLog | None = None
    ) -> None:
        self._loop = loop
        self._listening = listening
        self._access_log = access_log
        self._random = random.Random()
        self._targets = Targets(page)
        self._services: dict[str, Service] = {}
        self._attempts: set[Attempt] = set()
        self._waking: set[Dispatcher] = set()
        self.table = table
        self.connections = 0
        """Relayed now."""
        self.take(table)

    # --- the table --------------------------------------------------------------------------------------------------

    def take(self, table: Table) -> None:
        """From now on nothing is begun by an older table."""
        self.table = table
        self._targets.unlist_all()
        for name, route in table.routes.items():
            service = self._services.get(name)
            if service is None:
                self._services[name] = Service(name, Dispatcher(route, self._targets, self._random))
            else:
                service.dispatcher.take(route)
                service.take(route)
        for name in self._services.keys() - table.routes.keys():  # who waits for one that is gone is served as before
            dispatcher = self._services[name].dispatcher
            dispatcher.take(dispatcher.route)
        for attempt in list(self._attempts):
            attempt.table_changed()
        for target in self._targets:
            self._begin_closing(target)
        self._targets.drop_unused()
        for service in self._services.values():
            service.dispatcher.wake()

    @property
    def waiting(self) -> int:
        """Clients that have no backend yet."""
        return len(self._attempts)

    # --- clients ----------------------------------------------------------------------------------------------------

    def let_in(self, name: str, client: socket.socket, peer: object) -> None:
        """A new connection of a service. Takes ownership."""
        service = self._services.get(name)
        if service is None:  # its route is gone from the table, its listener stays until the reload
            reset_at_close(client)
            self._loop.close(client)
            return
        if service.is_plain and self._has_target(service, client, peer):
            return
        attempt = Attempt(client, peer, service.dispatcher, self, self._loop)
        self._attempts.add(attempt)
        rules = service.rules
        if rules is None:
            attempt.begin(reads_header=False)
        elif rules.trusts_peer(peer):
            attempt.begin(reads_header=True)
        elif rules.is_required:
            attempt.end("proxy", "its PROXY header is not trusted")
        else:
            attempt.begin(reads_header=False)

    def _has_target(self, service: Service, client: socket.socket, peer: object) -> bool:
        """Where the connection to a backend is made at once there is never an attempt, which would cost as much as all
        the rest. False: nothing has begun."""
        loop, dispatcher = self._loop, service.dispatcher
        is_inet = isinstance(peer, tuple)
        try:
            target = dispatcher.choose(peer[0] if is_inet else "", (), loop.now)  # type: ignore[index]
        except Nobody:
            return False
        if target is None:
            return False
        speaks = service.clients_first >= CLIENTS_FIRST
        server, failure = connecting.begin(target, dispatcher.route.timeouts.silent_seconds, speaks)
        if failure or server is None:
            attempt = Attempt(client, peer, dispatcher, self, loop)
            self._attempts.add(attempt)
            attempt.begin_with(target, server, failure)
            return True
        target.cells[TOTAL] += 1
        if dispatcher.measures:
            target.latency.observe(0.0, loop.now)
        source = (peer[0], peer[1]) if is_inet and self._access_log is not None else None  # type: ignore[index]
        context = Context(service, target, None, source, loop.now)
        self._relay(client, server, context)
        return True

    def connected(self, attempt: Attempt, target: Target, server: socket.socket, first: bytes, taken: int) -> None:
        """From an attempt: it has a backend. `first`: what the backend gets first; so much of it is the client's."""
        self._attempts.discard(attempt)
        source = hello = None
        if self._access_log is not None:
            source, hello = attempt.source, None if attempt.hello is None else logged(attempt.hello)
        service = self._services[attempt.service]
        context = Context(service, target, attempt.counted_as, source, attempt.began_at, hello)
        self._relay(attempt.client, server, context, first, taken)

    def _relay(
        self, client: socket.socket, server: socket.socket, context: Context, first: bytes = b"", taken: int = 0
    ) -> None:
        target = context.target
        if target.has_failed:
            target.has_failed = False
            self._listening.recovered(target.endpoint.identity)
        limits, answered = context.service.limits, self._answered
        relay = Relay(client, server, self._loop, limits, self._relayed, first, taken, context, on_answer=answered)
        self.connections += 1
        target.relays.add(relay)

    def is_spoken_to_first(self, dispatcher: Dispatcher) -> bool:
        """From an attempt: a server will most likely hear something before it says anything."""
        route = dispatcher.route
        return route.send_proxy != "off" or self._services[route.service].clients_first >= CLIENTS_FIRST

    def _answered(self, relay: Relay, is_first: bool) -> None:
        """From a relay: its server has spoken, and was the first, or was not."""
        service: Service = relay.context.service
        service.clients_first = 0 if is_first else service.clients_first + 1

    def connect_failed(self, target: Target, reason: str) -> None:
        """From an attempt."""
        target.has_failed = True
        self._listening.failed(target.endpoint.identity, reason)

    def queued(self, dispatcher: Dispatcher) -> None:
        """From an attempt: it waits. Places that other relay workers give back are looked for."""
        if dispatcher not in self._waking:
            self._waking.add(dispatcher)
            self._loop.timers.call_at(self._loop.now + RETRY_SECONDS, partial(self._look_for_place, dispatcher))

    def ended(self, attempt: Attempt, side: str, reason: str, is_late: bool, dispatcher: Dispatcher) -> None:
        """From an attempt: there will be no relay."""
        self._attempts.discard(attempt)
        self._uncount_source(attempt.counted_as, dispatcher)
        if self._access_log is not None:
            seconds = self._loop.now - attempt.began_at
            self._access_log.ended(attempt, dispatcher.route.service, side, reason, is_late, seconds)

    def close_some(self, count: int) -> None:
        """The deadline of a drain is near: so many connections are closed."""
        for target in self._targets:
            for relay in list(target.relays)[:count]:
                relay.close()
                count -= 1
        if count > 0:
            for attempt in list(self._attempts)[:count]:
                attempt.end("proxy", "the balancer drains")

    # --- moving: see lb.relay.moving ----------------------------------------------------------------------------------

    @property
    def attempts(self) -> list[Attempt]:
        return list(self._attempts)

    def relays(self) -> Iterator[Relay]:
        """All of them; they may go meanwhile."""
        for target in self._targets:
            yield from list(target.relays)

    def letter(self, relay: Relay) -> tuple[RelayLetter, tuple[int, ...]]:
        """What another process must know, and the fds that go along, borrowed."""
        context: Context = relay.context
        endpoint = context.target.endpoint
        state, fds = relay.state()
        letter = RelayLetter(
            service=context.service.name,
            identity=endpoint.identity,
            name=endpoint.name,
            address=endpoint.address,
            state=state,
            limits=context.service.limits.all_seconds,
            counted_as=context.counted_as,
            source=context.source,
            sni=None if context.hello is None else context.hello.sni,
            alpn=() if context.hello is None else context.hello.alpn,
        )
        return letter, fds

    def let_go(self, relay: Relay) -> Target:
        """It is another process's now. Its place at the backend is still counted here, and must be given back."""
        context: Context = relay.context
        relay.let_go()
        self.connections -= 1
        context.target.relays.discard(relay)
        self._uncount_source(context.counted_as, context.service.dispatcher)
        return context.target

    def let_attempt_go(self, attempt: Attempt) -> None:
        """It is another process's now."""
        attempt.let_go()
        self._attempts.discard(attempt)
        self._uncount_source(attempt.counted_as, attempt.dispatcher)

    def places_given_back(self) -> None:
        for service in self._services.values():
            service.dispatcher.wake()
        self._targets.drop_unused()

    def adopt(self, letter: RelayLetter, client: socket.socket, server: socket.socket, pipes: Sequence[int]) -> None:
        """A relay of another process. Takes ownership; it is let in whatever the limits are. Raises HandoffError,
        OSError, and owns nothing then."""
        service = self._services.get(letter.service) or self._without_route(letter)
        target = self._targets.adopt(Endpoint(identity=letter.identity, name=letter.name, address=letter.address))
        source = letter.source if self._access_log is not None else None
        hello = ClientHello(letter.sni, letter.alpn) if self._access_log is not None else None
        context = Context(service, target, letter.counted_as, source, letter.state.began_at, hello)
        moved = letter.state, pipes
        relay = Relay(client, server, self._loop, service.limits, self._relayed, context=context, moved=moved)
        target.cells[CURRENT] += 1
        if letter.counted_as is not None:
            service.dispatcher.sources[letter.counted_as] += 1
        self.connections += 1
        target.relays.add(relay)

    def has_service(self, name: str) -> bool:
        return name in self._services

    def adopt_attempt(self, letter: AttemptLetter, client: socket.socket) -> None:
        """A client of another process, which has no backend yet. Takes ownership."""
        service = self._services.get(letter.service)
        if service is None:
            reset_at_close(client)
            self._loop.close(client)
            return
        attempt = Attempt(client, None, service.dispatcher, self, self._loop)
        self._attempts.add(attempt)
        attempt.go_on(letter.state)

    def _without_route(self, letter: RelayLetter) -> Service:
        """The present table does not have its service any more; its connections go on as they were."""
        route = Route(service=letter.service, shares={"": 100}, pools={"": ()})
        service = Service(letter.service, Dispatcher(route, self._targets, self._random))
        service.limits = Limits(*letter.limits)
        self._services[letter.service] = service
        return service

    # --- within -----------------------------------------------------------------------------------------------------

    def _relayed(self, relay: Relay, closed: Closed) -> None:
        context: Context = relay.context
        target, dispatcher = context.target, context.service.dispatcher
        self.connections -= 1
        target.relays.discard(relay)
        cells = target.cells
        cells[SENT_BYTES] += closed.sent_bytes
        cells[RECEIVED_BYTES] += closed.received_bytes
        if closed.cause != "end":
            cells[RESET] += 1
        target.give_back()
        self._uncount_source(context.counted_as, dispatcher)
        if self._access_log is not None:
            seconds = self._loop.now - context.began_at
            self._access_log.relayed(context, closed, seconds)
        if dispatcher.queue or dispatcher.routed:
            dispatcher.wake()
        if not target.is_listed and not target.relays:
            self._targets.drop_unused()

    def _look_for_place(self, dispatcher: Dispatcher) -> None:
        self._waking.discard(dispatcher)
        dispatcher.wake()
        if dispatcher.waiting:
            self.queued(dispatcher)

    def count_source(self, attempt: Attempt, dispatcher: Dispatcher, is_let_in: bool = False) -> bool:
        """From an attempt, when its source is known. False: there are too many of it, and it was not `is_let_in`."""
        limit = dispatcher.route.per_source
        if limit is None or attempt.source is None:
            return True
        source = plain_address(attempt.source[0])
        if dispatcher.sources[source] >= limit and not is_let_in:
            return False
        dispatcher.sources[source] += 1
        attempt.counted_as = source
        return True

    def _uncount_source(self, source: str | None, dispatcher: Dispatcher) -> None:
        if source is not None:
            dispatcher.sources[source] -= 1
            if not dispatcher.sources[source]:
                del dispatcher.sources[source]

    def _begin_closing(self, target: Target) -> None:
        """What its endpoint says of closing is new: it is done from then on, or not any more."""
        if target.closing == target.endpoint.closing:
            return
        target.closing = closing = target.endpoint.closing
        if closing is not None:
            self._loop.timers.call_at(max(closing.at, self._loop.now), partial(self._close_a_share, target, closing))

    def _close_a_share(self, target: Target, closing: object) -> None:
        present = target.closing
        if present is None or present is not closing:
            return
        left = present.at + present.spread_seconds - self._loop.now
        share, pause_seconds = due_now(len(target.relays), left, CLOSING_TICK_SECONDS)
        for relay in list(target.relays)[:share]:
            relay.close()
        self._loop.timers.call_at(self._loop.now + pause_seconds, partial(self._close_a_share, target, closing))
