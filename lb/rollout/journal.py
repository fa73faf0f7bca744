"""The journal of rollouts, in a store: each run, each of its steps before it is taken, and who wants it to stop.

Keys, below `deploy/SERVICE/`: `current` (the newest run's id), `runs/ID`, `steps/ID/STEP`, `hosts/HOST` (its version).
Where connections are to go, for balancers that look there: `desired/SERVICE`. Requests of people who do not hold the
lock: `free/deploy/SERVICE/request`. A run is compressed: its plan for 1,000 hosts is larger than a value may be.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping

import msgspec

from handoff.errors import ExitCode, HandoffError
from lb.core.desired import PREFIX, Desired
from lb.core.rollout.progress import Record, Run
from lb.rollout.stores.base import Fenced, Lease, Store

MAXIMUM_RUN_BYTES = 64 * 1024 * 1024
MAXIMUM_KEPT_RUNS = 50
RECORDS_AT_ONCE = 64
"""In one transaction: etcd takes 128 operations."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Of somebody who does not hold the lock, to who does."""

    run: str
    wants: str
    """`pause` or `abort`."""
    who: str


class Journal:
    """Of one service. Its calls block, for as long as the store's do. Borrows the store."""

    def __init__(self, store: Store, service: str) -> None:
        self._store = store
        self._service = service
        self._root = f"deploy/{service}"
        self._request = f"free/deploy/{service}/request"

    @property
    def lock_name(self) -> str:
        return self._root

    # --- reading ----------------------------------------------------------------------------------------------------

    def latest(self) -> str | None:
        """The id of the newest run."""
        entry = self._store.get(f"{self._root}/current")
        return None if entry is None else entry.value.decode()

    def run(self, name: str) -> Run:
        """Raises HandoffError where there is none, or it cannot be read."""
        entry = self._store.get(f"{self._root}/runs/{name}")
        if entry is None:
            raise HandoffError(
                f"rollout {name} of {self._service}: is not in the journal", exit_code=ExitCode.NO_SUCH_SERVICE
            )
        return _decoded(entry.value, name)

    def records(self, name: str) -> dict[str, Record]:
        """Of its steps, by their ids."""
        found = {}
        for entry in self._store.list(f"{self._root}/steps/{name}/"):
            record = msgspec.json.decode(entry.value, type=Record)
            found[record.step] = record
        return found

    def changes(self, name: str, after: int, timeout: float) -> tuple[dict[str, Record], int]:
        """Records that were written after this version, as soon as there are any, and the version to go on from."""
        found = self._store.watch(f"{self._root}/steps/{name}/", after, timeout)
        records = [msgspec.json.decode(one.value, type=Record) for one in found]
        return {one.step: one for one in records}, max((one.version for one in found), default=after)

    def runs(self) -> list[Run]:
        """All that are kept, the newest first."""
        found = self._store.list(
            f"{self._root}/runs/"
        )  # by their writes: only the newest is written, and clocks are set
        return [_decoded(one.value, one.key) for one in sorted(found, key=lambda one: one.version, reverse=True)]

    def versions(self) -> dict[str, str]:
        """Of the hosts, as the last runs left them; one that is not known is left out."""
        prefix = f"{self._root}/hosts/"
        return {one.key.removeprefix(prefix): one.value.decode() for one in self._store.list(prefix) if one.value}

    def request(self, run: str) -> Request | None:
        """What somebody wants of this run."""
        entry = self._store.get(self._request)
        if entry is None:
            return None
        found = msgspec.json.decode(entry.value, type=Request)
        return found if found.run == run else None

    # --- writing ----------------------------------------------------------------------------------------------------

    def begin(self, lease: Lease, run: Run) -> None:
        """A new run; old ones beyond the limit are forgotten. Raises HandoffError, and StoreError."""
        current = self._store.get(f"{self._root}/current")
        puts = {f"{self._root}/current": run.id.encode(), self._run_key(run): _encoded(run)}
        self._write(lease, puts, compares={f"{self._root}/current": 0 if current is None else current.version})
        for old in self.runs()[MAXIMUM_KEPT_RUNS:]:
            self.forget(lease, old.id)

    def save(self, lease: Lease, run: Run) -> None:
        self._write(lease, {self._run_key(run): _encoded(run)})

    def write(self, lease: Lease, run: Run, records: Collection[Record], desired: Desired | None = None) -> None:
        """In place of what was known of these steps. `desired`, behind it: where connections are to go, for balancers
        that look there."""
        todo = {f"{self._root}/steps/{run.id}/{one.step}": msgspec.json.encode(one) for one in records}
        keys = list(todo)
        for at in range(0, len(keys), RECORDS_AT_ONCE):
            self._write(lease, {key: todo[key] for key in keys[at : at + RECORDS_AT_ONCE]})
        if desired is not None:
            self._write(lease, {f"{PREFIX}{self._service}": msgspec.json.encode(desired)})

    def end(self, lease: Lease, run: Run, versions: Mapping[str, str]) -> None:
        """The run with its verdict; `versions`: of the hosts that it has touched, empty where nobody knows."""
        for at in range(0, len(versions), RECORDS_AT_ONCE):
            part = list(versions.items())[at : at + RECORDS_AT_ONCE]
            self._write(lease, {f"{self._root}/hosts/{host}": version.encode() for host, version in part})
        self.save(lease, run)

    def ask(self, request: Request) -> None:
        """Anybody may."""
        self._store.txn(None, {}, {self._request: msgspec.json.encode(request)})

    def clear_request(self, lease: Lease) -> None:
        """What somebody wanted was done, or is over."""
        self._store.txn(lease, {}, {}, deletes=[self._request])

    def forget(self, lease: Lease, name: str) -> None:
        keys = [one.key for one in self._store.list(f"{self._root}/steps/{name}/")]
        keys.append(f"{self._root}/runs/{name}")
        for at in range(0, len(keys), RECORDS_AT_ONCE):
            self._store.txn(lease, {}, {}, deletes=keys[at : at + RECORDS_AT_ONCE])

    def _run_key(self, run: Run) -> str:
        return f"{self._root}/runs/{run.id}"

    def _write(self, lease: Lease, puts: Mapping[str, bytes], compares: Mapping[str, int] | None = None) -> None:
        if self._store.txn(lease, compares or {}, puts) is None:
            raise Fenced(f"rollouts of {self._service}: somebody else wrote the journal; look at handoff deploy status")


def _encoded(run: Run) -> bytes:
    return zlib.compress(msgspec.json.encode(run))


def _decoded(data: bytes, name: str) -> Run:
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(data, MAXIMUM_RUN_BYTES)
        return msgspec.json.decode(text, type=Run)
    except (zlib.error, msgspec.DecodeError) as error:
        raise HandoffError(f"rollout {name}: its journal cannot be read: {error}") from None
