"""What `lb.toml` says, checked: services, pools, backends, checks and timeouts. Plain data; times in seconds."""

from __future__ import annotations

from typing import Literal

import msgspec

TYPED = "command line"
"""In place of a file's name, where there is none."""
AlgorithmName = Literal["roundrobin", "leastconn", "random", "source", "maglev", "ewma"]
SendProxy = Literal["off", "v1", "v2"]
CheckType = Literal["tcp", "http", "tls", "agent", "command"]
Family = Literal["ipv4", "ipv6", "both"]
ANY_NAME = "*"
"""In a route: whatever name a client asks for, also none."""


class Backend(msgspec.Struct, frozen=True, kw_only=True):
    """One address that connections are relayed to: HOST:PORT, [V6]:PORT or unix:PATH."""

    name: str
    address: str
    weight: int = 1
    maxconn: int | None = None
    """Connections at once, over all relay workers; more wait in the service's queue."""
    backup: bool = False
    """It gets connections only while no other backend of its pool may."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """How health is asked for."""

    type: CheckType = "tcp"
    address: str | None = None
    """Whom to ask: another one than the backend itself. Numeric, without a port."""
    method: str = "GET"
    path: str = "/"
    host: str | None = None
    status: tuple[int, int] = (200, 399)
    """From, to: answers with another status have failed."""
    body: str | None = None
    """Must be found in the body."""
    port: int | None = None
    """Another one than that of the connections."""
    tls: bool = False
    """http: over TLS."""
    verify: bool = True
    """Of TLS: the certificate is of `sni`, and somebody who is trusted says so."""
    ca: str | None = None
    """The file of those who are trusted; None: whom the machine trusts."""
    sni: str | None = None
    """None: `host`, the name of the backend, its address."""
    send: str | None = None
    """agent: what it is sent first."""
    command: tuple[str, ...] = ()
    """command: a program and its arguments, which no shell looks at."""
    warm_up: tuple[str, ...] = ()
    """http: paths that are asked for, in order, before a backend that comes up gets its first connection."""
    warm_up_timeout_seconds: float = 10.0
    """For each of them."""
    interval_seconds: float = 2.0
    fast_interval_seconds: float | None = None
    """While the state is changing; None: a quarter of the interval."""
    timeout_seconds: float = 1.0
    rise: int = 2
    fall: int = 3


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """None: none. `first_byte`: of the backend's answer; `idle`: nothing either way; `queue`: for a free place;
    `client_hello`: for a client to say what it asks for, where that matters; `silent`: for a sign of life of TCP.

    `tunnel`: in place of `idle` once both sides have sent something. `drain`: for the connections of a backend that
    is drained; then they are closed, spread over `spread`.
    """

    connect_seconds: float = 5.0
    first_byte_seconds: float | None = None
    idle_seconds: float | None = 3600.0
    tunnel_seconds: float | None = None
    fin_seconds: float | None = 60.0
    queue_seconds: float = 10.0
    drain_seconds: float | None = None
    spread_seconds: float = 5.0
    client_hello_seconds: float = 5.0
    silent_seconds: float | None = 900.0


class Ejection(msgspec.Struct, frozen=True, kw_only=True):
    """Passive checks: `failures` to connect in a row put a backend out, each time for longer."""

    failures: int = 5
    """0: never."""
    base_seconds: float = 10.0
    maximum_seconds: float = 300.0
    maximum_percent: int = 50


class HelloRoute(msgspec.Struct, frozen=True, kw_only=True):
    """TLS connections that ask for such a name and for such a protocol go to this pool, whichever is active."""

    sni: tuple[str, ...] = ()
    """Names, in lower case; `*.example.com`: all that is below it, however deep; `*`: any, also none. Empty: any."""
    alpn: tuple[str, ...] = ()
    """The client offers one of them. Empty: whatever it offers."""
    pool: str


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """What clients connect to. Each pool is a set of backends; one is active."""

    name: str
    listen: tuple[str, ...]
    algorithm: AlgorithmName = "roundrobin"
    pools: dict[str, tuple[Backend, ...]]
    active: str
    send_proxy: SendProxy = "off"
    accept_proxy: Literal["off", "accept", "require"] = "off"
    proxy_from: tuple[str, ...] = ()
    """Networks whose PROXY headers are believed; `unix`: peers on a unix socket. Empty: what is local."""
    tls: Literal["accept", "require"] = "accept"
    """What does not begin as TLS does goes to the active pool, or is refused. It is never decrypted."""
    routes: tuple[HelloRoute, ...] = ()
    """The first that matches counts; where none does, the active pool."""
    maximum_queue: int = 1024
    """Connections that wait for a place at a backend, in each relay worker; what comes beyond is closed."""
    per_source: int | None = None
    """Connections at once from one address, in each relay worker; what comes beyond is closed."""
    slow_start_seconds: float = 0.0
    """A backend that is new, or that comes back, gets its full share after so long."""
    panic_percent: int = 0
    """When fewer of the active pool are up, health and ejections count for nothing. 0: never; where none is up clients
    are refused."""
    timeouts: Timeouts = Timeouts()
    check: Check | None = None
    """Of type agent: nothing goes to a backend before its agent has spoken."""
    agent: Check | None = None
    """Of type agent: asked beside the check."""
    ejection: Ejection = Ejection()

    @property
    def health_check(self) -> Check | None:
        """What passes or fails."""
        return None if self.check is not None and self.check.type == "agent" else self.check

    @property
    def agent_check(self) -> Check | None:
        return self.check if self.check is not None and self.check.type == "agent" else self.agent

    @property
    def routed_pools(self) -> frozenset[str]:
        """They get connections whichever pool is active."""
        return frozenset(route.pool for route in self.routes)


class Balancer(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file."""

    name: str
    relays: int = 1
    admin: str | None = None
    """HOST:PORT of the admin API; reads only, unless a token is set."""
    admin_token_file: str | None = None
    state: str | None = None
    """The directory of what must survive a reboot; None: /var/lib/handoff/NAME, or that of the user."""
    unready_seconds: float = 0.0
    """When the service stops: how long `/readyz` says no before nothing is accepted any more."""
    freebind: bool = False
    access_log: bool = False
    resolve_interval_seconds: float = 10.0
    """Backends that are called by a name: so often the name is looked up."""
    resolve_family: Family = "ipv4"
    """Addresses of the other family count only where a name has none of this one."""
    peers: tuple[str, ...] = ()
    """Balancers of the same services, as deploy.toml names them: one that starts takes newer revisions from them."""
    desired: str | None = None
    """The etcd that rollouts say in where connections are to go."""
    services: tuple[Service, ...]
    typed: tuple[str, ...] = ()
    """Fields of this table that the command line said, which win over the file's as long as the service runs."""
