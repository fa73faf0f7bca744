"""Where the connections of one service go: the choice of a backend, and the queue for when there is none."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection
from functools import partial
from random import Random
from typing import Protocol

from lb.core.algorithms import NEED_COUNTS, made
from lb.core.choice import Algorithm, Candidate
from lb.core.client_hello import ClientHello, NotTLS
from lb.core.hello_routes import HelloRoutes
from lb.core.table import Endpoint, Route
from lb.relay.targets import Target, Targets

RETRY_SECONDS = 0.02
"""A place that another relay worker has given back wakes nobody here."""


class Waiting(Protocol):
    """A client in the queue."""

    began_at: float

    @property
    def hello(self) -> ClientHello | NotTLS | None: ...

    def try_again(self) -> bool:
        """False: it must wait on, in its place."""


class Nobody(Exception):
    """No backend may get the connection, and waiting would not help."""


class Dispatcher:
    """Of one service, over its tables."""

    def __init__(self, route: Route, targets: Targets, random: Random) -> None:
        self._targets = targets
        self._random = random
        self._algorithms: dict[str, Algorithm] = {}
        self._pools: dict[str, list[Target]] = {}
        self.queue: deque[Waiting] = deque()
        self.routed: dict[str, deque[Waiting]] = {}
        """By pool: those whom a route leads there, so that who waits for one pool holds up nobody for another."""
        self.sources: Counter[str] = Counter()
        """Connections by the client's address; of use where there is a limit."""
        self.route = route
        self.take(route)

    def take(self, route: Route) -> None:
        """A new table."""
        if route.algorithm != self.route.algorithm or route.algorithm == "maglev":
            self._algorithms.clear()  # maglev is for those backends that it was made for
        self.route = route
        self._pools = {name: [self._targets.get(one) for one in pool] for name, pool in route.pools.items()}
        self._usable = {name: _usable(pool) for name, pool in self._pools.items()}
        self._only_pool = next(iter(route.shares)) if len(route.shares) == 1 else None
        self._needs_counts = route.algorithm in NEED_COUNTS
        self._is_maglev = route.algorithm == "maglev"
        self.measures = route.algorithm == "ewma"
        """It is to be told how long connecting takes."""
        self.reads_hello = bool(route.hello_routes) or route.tls == "require"
        """A client's `hello` must be known before a backend is chosen for it."""
        self._hello_routes = HelloRoutes(route.hello_routes)
        if route.hello_routes or self.routed:
            self._queue_anew()

    def allows(self, target: Target, hello: ClientHello | NotTLS | None = None) -> bool:
        """Whether the present table would send a new connection there."""
        if not target.is_listed or not _may_get(target.endpoint) or (self.reads_hello and hello is None):
            return False
        routed = self._routed(hello)
        pools = [name for name, share in self.route.shares.items() if share > 0] if routed is None else [routed]
        return any(target in self._pools.get(name, ()) for name in pools)

    def choose(
        self, source: str, tried: Collection[Target], now: float, hello: ClientHello | NotTLS | None = None
    ) -> Target | None:
        """A backend with a place taken at it, which must be given back; None: wait in the queue. Raises Nobody."""
        pool = self._only_pool
        if hello is not None:
            pool = self._routed(hello) or pool
        if pool is None:
            pool = self._drawn_pool()
        usable = self._usable[pool]
        if tried:
            usable = [one for one in usable if one not in tried] or _backups(self._pools[pool], tried)
        if not usable:
            if tried or not any(one.endpoint.is_awaited for one in self._pools[pool]):
                raise Nobody
            return None
        algorithm = self._algorithms.get(pool)
        if algorithm is None:
            everybody = partial(self._candidates, self._usable[pool], now)
            algorithm = self._algorithms[pool] = made(self.route.algorithm, everybody)
        while usable:
            chosen = usable[0] if len(usable) == 1 else self._chosen(algorithm, usable, source, now)
            if chosen.take_place():
                return chosen
            usable = [one for one in usable if one is not chosen]
        return None

    @property
    def waiting(self) -> int:
        """Clients in the queue."""
        return len(self.queue) + sum(len(queue) for queue in self.routed.values())

    def wait(self, client: Waiting) -> None:
        """At the end of the queue."""
        routed = self._routed(client.hello)
        (self.queue if routed is None else self.routed[routed]).append(client)

    def wake(self) -> None:
        """A place was given back, or the table is new: who waits tries, in order, until one has to wait on."""
        _wake(self.queue)
        for queue in self.routed.values():
            _wake(queue)

    def _queue_anew(self) -> None:
        """The routes may be others."""
        waiting = sorted((*self.queue, *(one for queue in self.routed.values() for one in queue)), key=_began_at)
        self.queue.clear()
        self.routed = {one.pool: deque() for one in self.route.hello_routes}
        for client in waiting:
            self.wait(client)

    def _routed(self, hello: ClientHello | NotTLS | None) -> str | None:
        """The pool that a route leads to."""
        return self._hello_routes.pool_of(hello) if isinstance(hello, ClientHello) else None

    def _chosen(self, algorithm: Algorithm, usable: list[Target], source: str, now: float) -> Target:
        candidates = self._candidates(usable, now)
        found = algorithm.choose(candidates, source, (self._random.random(), self._random.random()))
        assert found is not None, "a usable backend has a weight"
        return usable[candidates.index(found)]

    def _candidates(self, usable: list[Target], now: float) -> list[Candidate]:
        return [
            Candidate(
                one.endpoint.identity,
                one.endpoint.weight if self._is_maglev else self._weight(one.endpoint, now),
                one.connections if self._needs_counts else 0,
                one.latency.read(now) if self.measures else 0.0,
            )
            for one in usable
        ]

    def _weight(self, endpoint: Endpoint, now: float) -> float:
        """In the slow start it grows from a tenth to the whole."""
        seconds = self.route.slow_start_seconds
        if endpoint.up_since is None or seconds <= 0 or now >= endpoint.up_since + seconds:
            return endpoint.weight
        return endpoint.weight * max(0.1, (now - endpoint.up_since) / seconds)

    def _drawn_pool(self) -> str:
        shares = self.route.shares
        at = self._random.random() * 100
        for name, share in shares.items():
            at -= share
            if at < 0:
                return name
        return next(reversed(shares))


def _wake(queue: deque[Waiting]) -> None:
    for _ in range(len(queue)):
        first = queue.popleft()
        if not first.try_again():
            queue.appendleft(first)
            return


def _began_at(client: Waiting) -> float:
    return client.began_at


def _usable(pool: list[Target], with_backups: bool = False) -> list[Target]:
    """Those that may get connections; backups only where no other may."""
    found = [one for one in pool if _may_get(one.endpoint) and one.address is not None]
    return found if with_backups else [one for one in found if not one.endpoint.backup] or found


def _backups(pool: list[Target], tried: Collection[Target]) -> list[Target]:
    """For a client that no other could be connected to."""
    return [one for one in _usable(pool, with_backups=True) if one.endpoint.backup and one not in tried]


def _may_get(endpoint: Endpoint) -> bool:
    return endpoint.is_eligible and endpoint.weight > 0
