"""Where the truth of rollouts is kept: `open_store` opens what a URL names; base.py says what all of them do."""

from __future__ import annotations

import os
from collections.abc import Mapping

from handoff.errors import UsageError
from lb.rollout.stores.access import access_from
from lb.rollout.stores.base import Entry, Fenced, Holder, Lease, Locked, Store, StoreError
from lb.rollout.stores.etcd import EtcdStore
from lb.rollout.stores.gateway import TIMEOUT_SECONDS
from lb.rollout.stores.remote import RemoteStore, answer
from lb.rollout.stores.sqlite import SQLiteStore

__all__ = [
    "Entry",
    "EtcdStore",
    "Fenced",
    "Holder",
    "Lease",
    "Locked",
    "RemoteStore",
    "SQLiteStore",
    "Store",
    "StoreError",
    "answer",
    "open_store",
]


def open_store(
    url: str, *, near: str = ".", environ: Mapping[str, str] | None = None, timeout_seconds: float = TIMEOUT_SECONDS
) -> Store:
    """`sqlite:PATH` (relative to the directory `near`) or `etcd://HOST[:PORT],…[?KEY=VALUE&…]`. The caller closes it.

    Raises UsageError for what is neither, StoreError for a file that cannot be opened; etcd is first asked with
    the first call.
    """
    if url.startswith("sqlite:") and len(url) > len("sqlite:"):
        return SQLiteStore(os.path.join(near, url.removeprefix("sqlite:")))
    if url.startswith("etcd://"):
        access = access_from(url, near, os.environ if environ is None else environ)
        return EtcdStore(access, timeout_seconds)
    raise UsageError(f"store {url!r}: is none; expected balancer, sqlite:PATH or etcd://HOST:PORT,HOST:PORT")
