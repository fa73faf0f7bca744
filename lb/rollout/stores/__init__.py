"""Where the journal and the lock are kept: one interface, and what can keep them."""

from __future__ import annotations

from collections.abc import Callable

from handoff.errors import UsageError
from lb.rollout.stores.base import Store
from lb.rollout.stores.remote import RemoteStore
from lb.rollout.stores.sqlite import SQLiteStore


def open_store(url: str, call: Callable[[bytes], bytes], keeper: str) -> Store:
    """`balancer`: at the `keeper`, which `call` reaches; `sqlite:PATH`; `etcd://HOST:PORT,…`. Raises HandoffError."""
    scheme, _, rest = url.partition(":")
    if url == "balancer":
        return RemoteStore(call, keeper)
    if scheme == "sqlite" and rest:
        return SQLiteStore(rest)
    raise UsageError(f"store {url}: expected balancer, sqlite:PATH or etcd://HOST:PORT,HOST:PORT")
