"""What relay workers go by: which backends each service has, and which of them may get connections. Plain data.

The controller makes a table whenever something changed, and writes it into the runtime directory before it sends it
around: a relay worker that starts, or that has lost the controller, has the last one. Times are those of the machine's
monotonic clock, which all its processes share.
"""

from __future__ import annotations

import msgspec

from lb.core.model import AlgorithmName, HelloRoute, SendProxy, Timeouts


class Closing(msgspec.Struct, frozen=True, kw_only=True):
    """The connections of a backend are closed from `at` on, spread over so many seconds."""

    at: float
    spread_seconds: float = 0.0


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One backend."""

    identity: str
    """`SERVICE/POOL/NAME@ADDRESS#N`: its own for as long as it is configured. Removed and added again is another N."""
    name: str
    address: str
    weight: float = 1.0
    """0: it gets nothing new, without being drained."""
    maxconn: int | None = None
    backup: bool = False
    is_eligible: bool = True
    """It may get new connections."""
    is_awaited: bool = False
    """It may not, but only because its first check is not done: clients wait for that, in the queue."""
    up_since: float | None = None
    """From here on its weight grows, for the slow start; None: it is at its full weight."""
    closing: Closing | None = None


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One service."""

    service: str
    revision: int = 0
    """Of its active pool: each switch and each rollback makes the next one."""
    shares: dict[str, int]
    """Pools and the percentage of new connections each gets, the sum 100. Usually {active: 100}."""
    pools: dict[str, tuple[Endpoint, ...]]
    algorithm: AlgorithmName = "roundrobin"
    send_proxy: SendProxy = "off"
    accept_proxy: str = "off"
    proxy_from: tuple[str, ...] = ()
    tls: str = "accept"
    hello_routes: tuple[HelloRoute, ...] = ()
    """Pools for what a ClientHello asks for, ahead of the shares."""
    maximum_queue: int = 1024
    per_source: int | None = None
    slow_start_seconds: float = 0.0
    timeouts: Timeouts = Timeouts()


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """All services. A relay worker takes a table only if (generation, revision) is above that of its own."""

    generation: int
    """Of the controller that made it, as handoff numbers generations."""
    revision: int
    """From 1, by one controller and its restarts."""
    routes: dict[str, Route]
    """By the name of the service."""
