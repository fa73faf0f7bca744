"""What every store is: entries with versions, transactions that compare, and locks with a lease and a fencing token.

A store keeps the truth of rollouts. Its calls block, each for a bounded time, and may come from several threads.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Mapping
from typing import NamedTuple, Protocol, TypeAlias

from handoff.errors import ExitCode, HandoffError

FREE_PREFIX = "free/"
"""Keys that are written without a lock: requests to whoever holds it."""
MAXIMUM_VALUE_BYTES = 1024 * 1024
"""Of all values of a transaction together: etcd takes requests of 1.5 MiB."""
MAXIMUM_OPERATIONS = 100
"""Compares, puts and deletes of a transaction together: etcd takes 128 of each."""
MAXIMUM_OWNER_CHARACTERS = 200
MAXIMUM_LEASE_SECONDS = 24 * 3600.0
MAXIMUM_NUMBER = 2**63 - 1
"""Of versions and tokens."""
MAXIMUM_MESSAGE_CHARACTERS = 300
"""Of what others say, in our messages."""

_KEY = re.compile(r"[A-Za-z0-9._/-]{1,256}", re.ASCII)


class Entry(NamedTuple):
    """`version`: above 0, of its last change; greater than those of all changes before, of other keys too."""

    key: str
    value: bytes
    version: int


Entries: TypeAlias = list[Entry]


class Lease(NamedTuple):
    """A taken lock. `token`: greater with every lock() of that name. It ends `seconds` after the last renewal."""

    name: str
    owner: str
    token: int
    seconds: float


class Holder(NamedTuple):
    """Who has a lock. Epoch seconds, for messages only."""

    owner: str
    token: int
    since: float
    until: float


class StoreError(HandoffError):
    """The store cannot be reached, or spoke nonsense. A transaction under way may have been done, or not."""


class Locked(HandoffError):
    """Somebody else holds the lock."""

    def __init__(self, name: str, holder: Holder) -> None:
        text = f"lock {name}: is held by {holder.owner} since {_shown(holder.since)}"
        remedy = f"until {_shown(holder.until)}, unless it is renewed; wait for that, or ask them to end"
        super().__init__(f"{text}, {remedy}", ExitCode.LOCKED)
        self.name = name
        self.holder = holder


class Fenced(HandoffError):
    """Our lease has ended: nothing was written, and nothing more may be."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.ABORTED)


class Store(Protocol):
    """All methods raise StoreError, and HandoffError (REFUSED) for keys and values that are none."""

    def get(self, key: str) -> Entry | None: ...

    def list(self, prefix: str) -> Entries:
        """By key. A long list may come in parts, of which each is of one moment."""

    def txn(
        self,
        lease: Lease | None,
        compares: Mapping[str, int],
        puts: Mapping[str, bytes],
        deletes: Collection[str] = (),
    ) -> int | None:
        """All of it or nothing. `compares`: the versions that keys must have; 0: there must be none.

        Without a lease only for keys below `free/`. Returns the new version; None: a compare failed. Raises Fenced.
        """

    def watch(self, prefix: str, after: int, timeout: float) -> Entries:
        """Those that changed after this version, as they are now, as soon as there are any; empty after `timeout`
        seconds. What was deleted is not told."""

    def lock(self, name: str, owner: str, seconds: float) -> Lease:
        """Raises Locked."""

    def renew(self, lease: Lease) -> None:
        """Its whole length again, from now on. Raises Fenced."""

    def release(self, lease: Lease) -> None:
        """Nothing is wrong where it has ended already."""

    def holder(self, name: str) -> Holder | None: ...

    def close(self) -> None: ...


def refuse_key(key: str) -> None:
    """Raises HandoffError."""
    if _KEY.fullmatch(key) is None:
        raise _refused(f"key {key[:300]!r}: is none; use 1 to 256 of letters, digits and . _ / -")


def refuse_prefix(prefix: str) -> None:
    """Raises HandoffError. An empty one is of all keys."""
    if prefix:
        refuse_key(prefix)


def refuse_txn(
    lease: Lease | None, compares: Mapping[str, int], puts: Mapping[str, bytes], deletes: Collection[str]
) -> None:
    """Raises HandoffError for what no store takes."""
    for key in (*compares, *puts, *deletes):
        refuse_key(key)
        if lease is None and not key.startswith(FREE_PREFIX):
            raise _refused(f"key {key}: is written under a lock only; without one take {FREE_PREFIX}{key}"[:400])
    twice = set(puts) & set(deletes)
    if twice or len(set(deletes)) != len(deletes):
        raise _refused(f"key {min(twice or deletes)}: is named twice in one transaction")
    count = len(compares) + len(puts) + len(deletes)
    if count > MAXIMUM_OPERATIONS:
        raise _refused(f"a transaction of {count} operations; {MAXIMUM_OPERATIONS} are taken: make several of it")
    size = sum(len(value) for value in puts.values())
    if size > MAXIMUM_VALUE_BYTES:
        largest = max(puts, key=lambda key: len(puts[key]))
        raise _refused(f"key {largest}: a transaction with {size} bytes of values; {MAXIMUM_VALUE_BYTES} are taken")
    for key, version in compares.items():
        refuse_version(key, version)


def refuse_version(subject: str, version: int) -> None:
    """Raises HandoffError."""
    if not 0 <= version <= MAXIMUM_NUMBER:
        raise _refused(f"{subject}: version {version}: expected 0 to {MAXIMUM_NUMBER}")


def refuse_lock(name: str, owner: str, seconds: float) -> None:
    """Raises HandoffError."""
    refuse_key(name)
    if not owner.isprintable() or not 0 < len(owner) <= MAXIMUM_OWNER_CHARACTERS:
        text = f"owner {owner[:300]!r}: is none; use 1 to {MAXIMUM_OWNER_CHARACTERS} printable characters"
        raise _refused(f"lock {name}: {text}")
    if not 0 < seconds <= MAXIMUM_LEASE_SECONDS:
        raise _refused(f"lock {name}: a lease of {seconds} s: expected more than 0, up to {MAXIMUM_LEASE_SECONDS:g} s")


def next_token(last: int, wall: float) -> int:
    """Greater than the last one of this store. By the clock, also than those of a store that was lost: balancers and
    hosts remember them."""
    now = int(wall) if math.isfinite(wall) else 0
    return max(last + 1, min(now, MAXIMUM_NUMBER // 2))


def fenced(lease: Lease, holder: Holder | None) -> Fenced:
    """The lease has ended, and this is who has the lock now."""
    text = f"lock {lease.name}: our lease has ended (token {lease.token}, {lease.owner})"
    if holder is None:
        return Fenced(f"{text}; nobody has taken the lock since, or released it")
    return Fenced(f"{text}; {holder.owner} has the lock since {_shown(holder.since)} (token {holder.token})")


def one_line(text: object) -> str:
    """What somebody else said, fit for a message of ours."""
    cleaned = " ".join("".join(one if one.isprintable() else " " for one in str(text)).split())
    return cleaned[:MAXIMUM_MESSAGE_CHARACTERS]


def end_of_prefix(prefix: str) -> str:
    """The first key behind all that begin so. Keys are ASCII."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else "\x7f"


def _shown(at: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(at))
    except (OverflowError, ValueError, OSError):
        return f"second {at:g}"


def _refused(text: str) -> HandoffError:
    return HandoffError(f"store: {text}", ExitCode.REFUSED)
