"""The admin API: what is asked of the controller, and what it answers. JSON over HTTP; plain data.

`POST /v1/COMMAND` takes one of the requests below, named by their tags, and is answered with an `Answer`;
`GET /v1/status` with a `Status`; `GET /metrics` with Prometheus' text; `GET /livez` and `GET /readyz` with 200 or 503.

Writes are taken on the unix socket `admin.sock` (0600) in the runtime directory, and over TCP only with the token
(`Authorization: Bearer TOKEN`). HTTP statuses of answers: 200 done, 400 exit code 2, 404 exit code 5, 409 exit codes 6,
7 and 9, 504 exit code 4, 500 otherwise; 401 and 403 where the caller may not.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from lb.core.model import HelloRoute

SOCKET_NAME = "admin.sock"
OVERRIDES_PATH = "/v1/overrides"
"""What people have changed, as `lb.core.overrides` has it: for a balancer that starts beside this one."""
STORE_PATH = "/v1/store"
"""Takes what `lb.rollout.stores.remote` says, a write whatever it is; answered with 200, errors too."""
MAXIMUM_REQUEST_BYTES = 4 * 1024 * 1024


class _Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    who: str = ""
    """For the history: the user, or the program."""
    why: str = ""
    fence: str = ""
    """The lock under which a rollout asks: the highest token seen for it is kept, and a lower one refused (7)."""
    token: int = 0


class Drain(_Request, frozen=True, tag="drain"):
    """Nothing new to this backend. It holds until `ready`, or until `until_seconds` have passed."""

    server: str
    """SERVICE/SERVER, or SERVICE/POOL/SERVER."""
    wait_seconds: float | None = None
    """Answer when it has no connection left; exit code 4 when it still has after so long."""
    deadline_seconds: float | None = None
    """Close what is left then, spread over the service's `spread`; None: the service's `drain` timeout."""
    until_seconds: float | None = None


class Ready(_Request, frozen=True, tag="ready"):
    """As the configuration has it: drain, maint and a changed weight are gone."""

    server: str
    wait_seconds: float | None = None
    """Answer when it gets connections, that is, when it is up as well."""
    is_afresh: bool = False
    """Nothing is changed before it has passed a check that began after this; exit code 4 if it has not by then."""


class Verify(_Request, frozen=True, tag="verify"):
    """Whether this backend passes a check that begins after this. Changes nothing. One that somebody has put out is not
    judged."""

    server: str
    wait_seconds: float = 0.0
    """Exit code 4 if it has not by then."""


class Maint(_Request, frozen=True, tag="maint"):
    """No connections, no checks; what it has is closed."""

    server: str
    wait_seconds: float | None = None
    until_seconds: float | None = None


class Weight(_Request, frozen=True, tag="weight"):
    server: str
    weight: int


class Add(_Request, frozen=True, tag="add"):
    """A new backend, for as long as it is not removed. It gets nothing before its first passed check."""

    pool: str
    """SERVICE/POOL."""
    name: str
    address: str
    weight: int = 1
    maxconn: int | None = None
    backup: bool = False
    wait_seconds: float | None = None


class Remove(_Request, frozen=True, tag="remove"):
    """Nothing new, and it is gone from the pool when its connections have ended, or are closed as in a drain."""

    pool: str
    name: str
    wait_seconds: float | None = None
    deadline_seconds: float | None = None


class Switch(_Request, frozen=True, tag="switch"):
    """New connections go to this pool. Answered when not one goes to the former pool any more, in any relay worker."""

    service: str
    pool: str
    revision: int | None = None
    """Compare and swap: refused (9) where the service's revision is another one by now."""
    percent: int = 100
    """So many of new connections to `pool`, the rest to the one that was active."""
    wait_seconds: float = 0.0
    """For the pool to be healthy: every backend that is not drained is up. Refused (9) if it is not by then."""
    is_partial_enough: bool = False
    """A pool of which one is up is good enough: for a way back."""
    drain_old: bool = False
    """Close what the old pool has, as in a drain. Otherwise it stays warm: kept, checked, and its connections live."""
    deadline_seconds: float | None = None


class Prepare(_Request, frozen=True, tag="prepare"):
    """Whether a switch to this pool would be taken: answered with the revision to switch from. Changes nothing."""

    service: str
    pool: str
    revision: int | None = None
    """Refused (9) where the service's revision is another one."""
    wait_seconds: float = 0.0
    """For the pool to be healthy; refused (9) if it is not by then."""
    is_afresh: bool = False
    """Only checks that begin after this count."""
    is_partial_enough: bool = False
    """As for the switch."""


class Rollback(_Request, frozen=True, tag="rollback"):
    """The shares of the previous revision, as the next revision. Refused (9) where there is none."""

    service: str
    wait_seconds: float = 0.0


class Apply(_Request, frozen=True, tag="apply"):
    """The text of a file takes the place of the configured layer. What needs a reload is said, and left as it is."""

    text: str
    shown: str
    """The file as it is called in messages."""


Request: TypeAlias = Drain | Ready | Maint | Weight | Add | Remove | Verify | Prepare | Switch | Rollback | Apply


class Exchange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `handoff lb request` is asked on its standard input."""

    method: Literal["GET", "POST"]
    path: str
    body: str = ""


class Exchanged(msgspec.Struct, frozen=True, kw_only=True):
    """And what it answers."""

    status: int
    """Of HTTP."""
    body: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    exit_code: int
    """The design's table: 0 done, 2 usage, 4 timed out, 5 no such service or backend, 7 fenced, 9 refused, nothing
    changed."""
    message: str
    """One line."""
    notes: tuple[str, ...] = ()
    """What else is worth knowing, a line each: `not durable: …`, `needs a reload: …`, a stale override."""
    revision: int | None = None
    """Of the service that was switched."""


class BackendStatus(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    address: str
    identity: str
    administrative: str
    health: str
    is_ejected: bool
    is_eligible: bool
    weight: float
    backup: bool
    maxconn: int | None
    connections: int
    """Now, over all relay workers."""
    total: int
    failed: int
    reset: int
    sent_bytes: int
    received_bytes: int
    connect_seconds: float = 0.0
    """Of all connections that were made, the sum."""
    last_check: str
    """`passed in 2 ms`, `connection refused`, `status 503`; empty where it has none."""
    agent: str = ""
    """`drain 50% (backup runs)`, `no answer: connection refused`; empty where it has none, or it never answered."""
    since_seconds: float
    """How long it has been in this state."""
    override: str
    """`drain by ann: upgrade of the kernel`; empty where it is as configured."""


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True):
    percent: int
    is_routed: bool = False
    """A route leads to it, whatever its percentage."""
    backends: dict[str, BackendStatus]


class ServiceStatus(msgspec.Struct, frozen=True, kw_only=True):
    listen: tuple[str, ...]
    algorithm: str
    revision: int
    pools: dict[str, PoolStatus]
    tls: str = "accept"
    routes: tuple[HelloRoute, ...] = ()
    """By SNI and ALPN, in their order."""


class RelayStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One relay worker."""

    pid: int
    generation: int
    slot: int
    is_draining: bool
    taken: int
    """The revision of the table that it has."""


class NameStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Of a name that backends are called by."""

    addresses: tuple[str, ...]
    """Of the last good answer."""
    age_seconds: float | None
    """Of that answer; None: there was none yet."""
    error: str
    """Why the latest lookup failed; empty: it did not."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    generation: int
    revision: int
    """Of the table."""
    is_durable: bool
    services: dict[str, ServiceStatus]
    relays: tuple[RelayStatus, ...]
    names: dict[str, NameStatus] = {}
    """By the address as it is configured."""
    file: str | None = None
    """What it runs, absolute; None: what was typed."""
    unheard_peers: tuple[str, ...] = ()
    """They have not answered since this balancer started; they may know newer revisions."""
