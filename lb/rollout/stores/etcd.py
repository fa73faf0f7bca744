"""A store in etcd, 3.4 and later, through its JSON gateway.

Below the prefix: `entry/KEY`; `lock/NAME`, which lives as long as its lease, and holds the token; `holder/NAME`, who
took it last; `last/NAME`, the mark of the last transaction under that lock. Each transaction under a lock compares the
token, and names the transaction before it: so it can be sent again, to another endpoint too, and is done once; one that
was delayed on its way comes to nothing.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import msgspec

from lb.rollout.stores.access import Access
from lb.rollout.stores.base import (
    Entries,
    Entry,
    Holder,
    Lease,
    Locked,
    StoreError,
    end_of_prefix,
    fenced,
    next_token,
    one_line,
    refuse_key,
    refuse_lock,
    refuse_prefix,
    refuse_txn,
    refuse_version,
)
from lb.rollout.stores.gateway import TIMEOUT_SECONDS, Answered, Gateway, Header, Refusal, T

Parts: TypeAlias = list[dict[str, Any]]
"""Of a transaction."""
ENTRIES_AT_ONCE = 64
"""Of a list: with the largest values what the gateway takes as one answer."""
WATCH_SECONDS = 10.0
"""A stream may be silent for other reasons than silence: after so long we look."""
MAXIMUM_RACES = 20
"""So often somebody else may come first between our look and our write."""


class _KeyValue(msgspec.Struct, frozen=True):
    key: bytes
    value: bytes = b""
    create_revision: int = 0
    mod_revision: int = 0
    lease: int = 0


class _Range(msgspec.Struct, frozen=True):
    kvs: list[_KeyValue] = []
    more: bool = False


class _Ranged(Answered, frozen=True):
    kvs: list[_KeyValue] = msgspec.field(default_factory=list)
    more: bool = False


class _Operation(msgspec.Struct, frozen=True):
    response_range: _Range = _Range()


class _Done(Answered, frozen=True):
    succeeded: bool = False
    responses: list[_Operation] = msgspec.field(default_factory=list)


class _Granted(Answered, frozen=True):
    ID: int
    TTL: int


class _Lived(Answered, frozen=True):
    TTL: int = 0


class _Kept(msgspec.Struct, frozen=True):
    result: _Lived

    @property
    def header(self) -> Header:
        return self.result.header


class _Event(msgspec.Struct, frozen=True):
    type: str = "PUT"


class _Watched(msgspec.Struct, frozen=True):
    events: list[_Event] = []
    canceled: bool = False


class _Line(msgspec.Struct, frozen=True):
    result: _Watched


class _Taken(msgspec.Struct, frozen=True):
    """`holder/NAME`. `since`: by the wall clock of who took it."""

    owner: str
    token: int
    since: float


class _Now(msgspec.Struct, frozen=True):
    """A lock, as it is: its key, where somebody has it, and who took it last."""

    lock: _KeyValue | None
    taken: _Taken | None
    taken_at: int
    """The version of that key."""


_LINE: msgspec.json.Decoder[_Line] = msgspec.json.Decoder(_Line, strict=False)


class EtcdStore:
    """Nothing is asked before the first call."""

    def __init__(self, access: Access, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._root = access.prefix
        self._gateway = Gateway(access, timeout_seconds)
        self._timeout_seconds = timeout_seconds
        self._writing = threading.Lock()
        self._last: dict[str, int] = {}
        """Of locks: the version of our last transaction's mark."""

    def get(self, key: str) -> Entry | None:
        refuse_key(key)
        found = self._ask("/v3/kv/range", {"key": self._key(key)}, _Ranged).kvs
        return self._entry(found[0]) if found else None

    def list(self, prefix: str) -> Entries:
        refuse_prefix(prefix)
        return self._changed_after(prefix, 0)[0]

    def txn(
        self,
        lease: Lease | None,
        compares: Mapping[str, int],
        puts: Mapping[str, bytes],
        deletes: Collection[str] = (),
    ) -> int | None:
        refuse_txn(lease, compares, puts, deletes)
        conditions = [_is_version(self._key(key), version) for key, version in compares.items()]
        changes = [_put(self._key(key), bytes(value)) for key, value in puts.items()]
        changes += [{"request_delete_range": {"key": self._key(key)}} for key in deletes]
        if lease is None:
            body = {"compare": conditions, "success": changes}
            done = self._ask("/v3/kv/txn", body, _Done, may_repeat=not conditions)
            return done.header.revision if done.succeeded else None
        refuse_key(lease.name)
        if not self._writing.acquire(timeout=2 * self._timeout_seconds):
            raise self._gateway.error("other calls to it do not end")
        try:
            return self._write(lease, conditions, changes)
        finally:
            self._writing.release()

    def watch(self, prefix: str, after: int, timeout: float) -> Entries:
        refuse_prefix(prefix)
        refuse_version(f"watch {prefix}", after)
        deadline = time.monotonic() + timeout
        while True:
            found, revision = self._changed_after(prefix, after)
            left = deadline - time.monotonic()
            if found or left <= 0:
                return found
            begin = {**self._within(prefix), "start_revision": str(revision + 1), "filters": ["NODELETE"]}
            seconds = min(left, WATCH_SECONDS)
            if not self._gateway.wait_for_line("/v3/watch", {"create_request": begin}, seconds, _has_change):
                self._gateway.pause()

    def lock(self, name: str, owner: str, seconds: float) -> Lease:
        refuse_lock(name, owner, seconds)
        now = self._now(name)
        self._refuse_locked(name, now)
        granted = self._ask("/v3/lease/grant", {"TTL": str(math.ceil(seconds)), "ID": "0"}, _Granted)
        try:
            token = self._take(name, owner, granted.ID, now)
        except Locked:
            self._revoke(granted.ID)
            raise
        return Lease(name, owner, token, float(granted.TTL))

    def renew(self, lease: Lease) -> None:
        refuse_key(lease.name)
        now = self._now(lease.name)
        if now.lock is None or not _is_ours(now.lock, lease):
            raise fenced(lease, self._holder(now))
        kept = self._ask("/v3/lease/keepalive", {"ID": str(now.lock.lease)}, _Kept).result
        if kept.TTL <= 0:
            raise fenced(lease, None)

    def release(self, lease: Lease) -> None:
        refuse_key(lease.name)
        lock = self._now(lease.name).lock
        if lock is None or not _is_ours(lock, lease):
            return
        key = self._at("lock", lease.name)
        body = {"compare": [_is_value(key, lock.value)], "success": [{"request_delete_range": {"key": key}}]}
        self._ask("/v3/kv/txn", body, _Done)
        self._revoke(lock.lease)

    def holder(self, name: str) -> Holder | None:
        refuse_key(name)
        return self._holder(self._now(name))

    def close(self) -> None:
        self._gateway.close()

    # --- locks ------------------------------------------------------------------------------------------------------

    def _now(self, name: str) -> _Now:
        body = {"success": self._look(name)}
        return self._read(self._ask("/v3/kv/txn", body, _Done), name)

    def _look(self, name: str) -> Parts:
        return [_range(self._at("lock", name)), _range(self._at("holder", name))]

    def _read(self, done: _Done, name: str) -> _Now:
        lock, holder = (self._only(done, index) for index in (0, 1))
        if holder is None:
            return _Now(lock, None, 0)
        try:
            return _Now(lock, msgspec.json.decode(holder.value, type=_Taken), holder.mod_revision)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            text = f"{self._root}holder/{name}: is none of handoff's ({one_line(error)}); remove it, or take another"
            raise self._gateway.error(f"{text} prefix") from None

    def _refuse_locked(self, name: str, now: _Now) -> None:
        """Raises Locked."""
        holder = self._holder(now)
        if holder is not None:
            raise Locked(name, holder)

    def _take(self, name: str, owner: str, lease: int, now: _Now) -> int:
        """The token. Raises Locked, StoreError."""
        lock, holder = self._at("lock", name), self._at("holder", name)
        for _ in range(MAXIMUM_RACES):
            wall = time.time()
            token = next_token(0 if now.taken is None else now.taken.token, wall)
            taken = msgspec.json.encode(_Taken(one_line(owner), token, wall))
            body = {
                "compare": [_is_version(lock, 0), _is_version(holder, now.taken_at)],
                "success": [_put(lock, str(token).encode(), lease), _put(holder, taken)],
                "failure": self._look(name),
            }
            done = self._ask("/v3/kv/txn", body, _Done)
            if done.succeeded:
                return token
            now = self._read(done, name)
            if now.lock is not None and now.lock.lease == lease and now.lock.value == str(token).encode():
                return token  # it was taken at a try that we saw no answer of
            self._refuse_locked(name, now)
            if now.lock is not None:  # it has ended, and is removed in a moment
                self._gateway.pause()
        raise self._gateway.error(f"lock {name}: too many take it at once; try again")

    def _holder(self, now: _Now) -> Holder | None:
        if now.lock is None or now.taken is None:
            return None
        left = self._ask("/v3/lease/timetolive", {"ID": str(now.lock.lease)}, _Lived).TTL
        return Holder(now.taken.owner, now.taken.token, now.taken.since, time.time() + left) if left > 0 else None

    def _revoke(self, lease: int) -> None:
        """What we do not get rid of ends by itself."""
        try:
            self._gateway.ask("/v3/lease/revoke", {"ID": str(lease)}, Answered)
        except (Refusal, StoreError):
            return

    # --- entries ----------------------------------------------------------------------------------------------------

    def _write(self, lease: Lease, conditions: Parts, changes: Parts) -> int | None:
        """Raises Fenced."""
        lock, last = self._at("lock", lease.name), self._at("last", lease.name)
        mark = os.urandom(16)
        before = self._last.get(lease.name)
        for _ in range(MAXIMUM_RACES):
            if before is None:
                found = self._ask("/v3/kv/range", {"key": last}, _Ranged).kvs
                before = found[0].mod_revision if found else 0
            ours = [_is_value(lock, str(lease.token).encode()), _is_version(last, before)]
            body = {
                "compare": [*ours, *conditions],
                "success": [_put(last, mark), *changes],
                "failure": [_range(lock), _range(last)],
            }
            done = self._ask("/v3/kv/txn", body, _Done)
            if done.succeeded:
                self._last[lease.name] = done.header.revision
                return done.header.revision
            held, marked = self._only(done, 0), self._only(done, 1)
            if marked is not None and marked.value == mark:  # it was done at a try that we saw no answer of
                self._last[lease.name] = marked.mod_revision
                return marked.mod_revision
            if held is None or not _is_ours(held, lease):
                raise fenced(lease, self.holder(lease.name))
            if (0 if marked is None else marked.mod_revision) == before:
                return None
            before = 0 if marked is None else marked.mod_revision
        raise self._gateway.error(f"lock {lease.name}: others write under our lease")

    def _changed_after(self, prefix: str, after: int) -> tuple[Entries, int]:
        """And the version of the store, as it was then."""
        found: Entries = []
        body: dict[str, Any] = {**self._within(prefix), "limit": str(ENTRIES_AT_ONCE)}
        if after:
            body["min_mod_revision"] = str(after + 1)
        while True:
            part = self._ask("/v3/kv/range", body, _Ranged)
            found += [self._entry(one) for one in part.kvs]
            if not part.more:
                return found, int(body.get("revision", part.header.revision))
            if not part.kvs:
                raise self._gateway.error("its answer cannot be used: a part of a list that has nothing in it")
            body.setdefault("revision", str(part.header.revision))  # all parts are of one moment
            body["key"] = part.kvs[-1].key + b"\0"

    def _entry(self, found: _KeyValue) -> Entry:
        root = self._at("entry", "").decode()
        key = found.key.decode("ascii", "replace")
        if not key.startswith(root) or found.mod_revision <= 0:
            raise self._gateway.error("its answer cannot be used: another key than what was asked for")
        return Entry(key.removeprefix(root), found.value, found.mod_revision)

    def _only(self, done: _Done, index: int) -> _KeyValue | None:
        if len(done.responses) <= index:
            raise self._gateway.error("its answer cannot be used: it lacks what was asked for")
        found = done.responses[index].response_range.kvs
        return found[0] if found else None

    # --- asking -----------------------------------------------------------------------------------------------------

    def _at(self, kind: str, name: str) -> bytes:
        return f"{self._root}{kind}/{name}".encode()

    def _key(self, key: str) -> bytes:
        return self._at("entry", key)

    def _within(self, prefix: str) -> dict[str, Any]:
        begin = self._at("entry", prefix).decode()
        return {"key": begin.encode(), "range_end": end_of_prefix(begin).encode()}

    def _ask(self, path: str, body: dict[str, Any], kind: type[T], *, may_repeat: bool = True) -> T:
        """Raises StoreError."""
        try:
            return self._gateway.ask(path, body, kind, may_repeat=may_repeat)
        except Refusal as refusal:
            raise self._refused(refusal) from None

    def _refused(self, refusal: Refusal) -> StoreError:
        return self._gateway.error(f"refuses it: {one_line(refusal)}")


def _is_ours(lock: _KeyValue, lease: Lease) -> bool:
    return lock.value == str(lease.token).encode()


def _has_change(line: bytes) -> bool | None:
    """Raises msgspec.DecodeError."""
    result = _LINE.decode(line).result
    return False if result.canceled else bool(result.events) or None


def _range(key: bytes) -> dict[str, Any]:
    return {"request_range": {"key": key}}


def _put(key: bytes, value: bytes, lease: int = 0) -> dict[str, Any]:
    return {"request_put": {"key": key, "value": value, "lease": str(lease)}}


def _is_version(key: bytes, version: int) -> dict[str, Any]:
    return {"key": key, "target": "MOD", "result": "EQUAL", "mod_revision": str(version)}


def _is_value(key: bytes, value: bytes) -> dict[str, Any]:
    return {"key": key, "target": "VALUE", "result": "EQUAL", "value": value}
