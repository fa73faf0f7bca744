"""What every store of rollouts can do: keys with versions, transactions, one leased lock with a fencing token."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple, Protocol

from handoff.errors import ExitCode, HandoffError, UsageError

MAXIMUM_VALUE_BYTES = 1024 * 1024
MAXIMUM_OPERATIONS = 100
"""Of one transaction; etcd takes 128, compares and the lock's own included."""
FREE = "free/"
"""What does not hold the lock may write keys that begin so."""
_KEY = re.compile(r"[A-Za-z0-9._/-]{1,256}")


class Entry(NamedTuple):
    key: str
    value: bytes
    version: int
    """Of the store, when this was written last; above 0."""


class Lease(NamedTuple):
    """Of a lock. `token`: grows with every lock of that name; who shows a lower one is an older owner."""

    name: str
    owner: str
    token: int
    seconds: float
    """It ends so long after it was taken, or renewed."""


class Holder(NamedTuple):
    """Who has a lock; times in seconds since 1970, for people."""

    owner: str
    token: int
    since: float
    until: float


class StoreError(HandoffError):
    """The store cannot be reached, or answers what makes no sense. What it was asked for may have happened."""


class Fenced(HandoffError):
    """The lease has ended, and somebody else may be at work."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.LOCKED)


class Locked(HandoffError):
    """Somebody has the lock."""

    def __init__(self, name: str, holder: Holder) -> None:
        since, until = (time.strftime("%H:%M:%SZ", time.gmtime(at)) for at in (holder.since, holder.until))
        super().__init__(
            f"{name}: is locked by {holder.owner} since {since}, until {until} at the earliest", ExitCode.LOCKED
        )
        self.holder = holder


class Store(Protocol):
    """Every call blocks for a bounded time, and raises StoreError where the store is not there. For several threads."""

    def get(self, key: str) -> Entry | None: ...

    def entries(self, prefix: str) -> list[Entry]:
        """In the order of their keys."""

    def txn(
        self,
        lease: Lease | None,
        compares: Mapping[str, int],
        puts: Mapping[str, bytes],
        deletes: Collection[str] = (),
    ) -> int | None:
        """All or nothing. `compares`: keys and the versions that they must have, 0: there must be none.

        The version of what was written; None: a comparison failed. Raises Fenced where the lease is not the lock's any
        more. Without a lease only keys below `free/` are written.
        """

    def watch(self, prefix: str, after: int, timeout: float) -> list[Entry]:
        """What has changed behind that version, as soon as there is something; nothing when the time is over."""

    def lock(self, name: str, owner: str, seconds: float) -> Lease:
        """Raises Locked."""

    def renew(self, lease: Lease) -> None:
        """From now on it has its whole time again. Raises Fenced."""

    def release(self, lease: Lease) -> None:
        """If it is still ours."""

    def holder(self, name: str) -> Holder | None: ...

    def close(self) -> None: ...


def check_keys(keys: Iterable[str]) -> None:
    """Raises UsageError."""
    for key in keys:
        if not _KEY.fullmatch(key):
            raise UsageError(f"store: key {key[:80]!r}: expected up to 256 letters, digits and . _ / -")


def check_txn(
    lease: Lease | None, compares: Collection[str], puts: Mapping[str, bytes], deletes: Collection[str]
) -> None:
    """Raises UsageError."""
    check_keys((*compares, *puts, *deletes))
    if len(compares) + len(puts) + len(deletes) > MAXIMUM_OPERATIONS:
        raise UsageError(f"store: more than {MAXIMUM_OPERATIONS} keys in one transaction")
    for key, value in puts.items():
        if len(value) > MAXIMUM_VALUE_BYTES:
            raise UsageError(f"store: {key}: {len(value)} bytes; at most {MAXIMUM_VALUE_BYTES}")
    if lease is None and not all(key.startswith(FREE) for key in (*puts, *deletes)):
        raise UsageError(f"store: without the lock only keys below {FREE} are written")


def fenced(lease: Lease) -> Fenced:
    return Fenced(
        f"{lease.name}: the lock of {lease.owner} (token {lease.token}) has ended; somebody else may be at work"
    )
