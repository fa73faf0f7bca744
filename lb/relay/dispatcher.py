"""Where the connections of one service go: the choice of a backend, and the queue for when there is none."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection
from functools import partial
from random import Random
from typing import Protocol

from lb.core.algorithms import NEED_COUNTS, made
from lb.core.choice import Algorithm, Candidate
from lb.core.table import Endpoint, Route
from lb.relay.targets import Target, Targets

RETRY_SECONDS = 0.02
"""A place that another relay worker has given back wakes nobody here."""


class Waiting(Protocol):
    """A client in the queue."""

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
        self._needs_counts = route.algorithm in NEED_COUNTS
        self._is_maglev = route.algorithm == "maglev"
        self.measures = route.algorithm == "ewma"
        """It is to be told how long connecting takes."""

    def allows(self, target: Target) -> bool:
        """Whether the present table would send a new connection there."""
        return (
            target.is_listed
            and _may_get(target.endpoint)
            and any(share > 0 and target in self._pools.get(name, ()) for name, share in self.route.shares.items())
        )

    def choose(self, source: str, tried: Collection[Target], now: float) -> Target | None:
        """A backend with a place taken at it, which must be given back; None: wait in the queue. Raises Nobody."""
        pool = self._pool()
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

    def wake(self) -> None:
        """A place was given back, or the table is new: who waits tries, in order, until one has to wait on."""
        for _ in range(len(self.queue)):
            first = self.queue.popleft()
            if not first.try_again():
                self.queue.appendleft(first)
                return

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

    def _pool(self) -> str:
        shares = self.route.shares
        if len(shares) == 1:
            return next(iter(shares))
        at = self._random.random() * 100
        for name, share in shares.items():
            at -= share
            if at < 0:
                return name
        return next(reversed(shares))


def _usable(pool: list[Target], with_backups: bool = False) -> list[Target]:
    """Those that may get connections; backups only where no other may."""
    found = [one for one in pool if _may_get(one.endpoint) and one.address is not None]
    return found if with_backups else [one for one in found if not one.endpoint.backup] or found


def _backups(pool: list[Target], tried: Collection[Target]) -> list[Target]:
    """For a client that no other could be connected to."""
    return [one for one in _usable(pool, with_backups=True) if one.endpoint.backup and one not in tried]


def _may_get(endpoint: Endpoint) -> bool:
    return endpoint.is_eligible and endpoint.weight > 0
