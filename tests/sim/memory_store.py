"""A store in memory, with a clock that a test sets: quick, for many runs. What a store must do is in test_stores.py."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping

from lb.rollout.stores.base import Entries, Entry, Holder, Lease, Locked, fenced, next_token


class MemoryStore:
    """`on_write`, around each transaction and before a release: it may raise, as if a way had broken."""

    def __init__(self) -> None:
        self.now = 0.0
        self.on_write: Callable[[str], None] = lambda when: None
        self._entries: dict[str, Entry] = {}
        self._version = 0
        self._locks: dict[str, tuple[Lease, float]] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def list(self, prefix: str) -> Entries:
        return sorted(one for one in self._entries.values() if one.key.startswith(prefix))

    def txn(
        self,
        lease: Lease | None,
        compares: Mapping[str, int],
        puts: Mapping[str, bytes],
        deletes: Collection[str] = (),
    ) -> int | None:
        self.on_write("before")
        with self._lock:
            if lease is not None:
                self._require(lease)
            if any((one.version if (one := self.get(key)) else 0) != version for key, version in compares.items()):
                return None
            self._version += 1
            self._entries.update({key: Entry(key, value, self._version) for key, value in puts.items()})
            for key in deletes:
                self._entries.pop(key, None)
        self.on_write("behind")
        return self._version

    def watch(self, prefix: str, after: int, timeout: float) -> Entries:
        return [one for one in self.list(prefix) if one.version > after]

    def lock(self, name: str, owner: str, seconds: float) -> Lease:
        with self._lock:
            holder = self.holder(name)
            if holder is not None:
                raise Locked(name, holder)
            last = self._locks[name][0].token if name in self._locks else 0
            lease = Lease(name, owner, next_token(last, 0.0), seconds)
            self._locks[name] = lease, self.now + seconds
            return lease

    def renew(self, lease: Lease) -> None:
        with self._lock:
            self._require(lease)
            self._locks[lease.name] = lease, self.now + lease.seconds

    def release(self, lease: Lease) -> None:
        self.on_write("release")
        with self._lock:
            if lease.name in self._locks and self._locks[lease.name][0].token == lease.token:
                self._locks[lease.name] = lease, self.now

    def holder(self, name: str) -> Holder | None:
        lease, until = self._locks.get(name, (None, 0.0))
        return None if lease is None or until <= self.now else Holder(lease.owner, lease.token, 0.0, until)

    def close(self) -> None:
        pass

    def _require(self, lease: Lease) -> None:
        holder = self.holder(lease.name)
        if holder is None or holder.token != lease.token:
            raise fenced(lease, holder)
