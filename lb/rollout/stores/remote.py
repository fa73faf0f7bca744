"""A store that another process keeps: one JSON request, one JSON answer, over whatever carries them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import msgspec

from handoff.errors import HandoffError, UsageError
from lb.rollout.stores.base import Entry, Fenced, Holder, Lease, Locked, Store, StoreError

MAXIMUM_WATCH_SECONDS = 10.0
"""Of one request; a longer watch is several."""
MAXIMUM_LEASE_SECONDS = 3600.0

T = TypeVar("T")


class _Get(msgspec.Struct, frozen=True, tag="get", forbid_unknown_fields=True):
    key: str


class _List(msgspec.Struct, frozen=True, tag="list", forbid_unknown_fields=True):
    prefix: str


class _Txn(msgspec.Struct, frozen=True, tag="txn", forbid_unknown_fields=True):
    lease: Lease | None
    compares: dict[str, int]
    puts: dict[str, bytes]
    deletes: tuple[str, ...]


class _Watch(msgspec.Struct, frozen=True, tag="watch", forbid_unknown_fields=True):
    prefix: str
    after: int
    timeout: float


class _Lock(msgspec.Struct, frozen=True, tag="lock", forbid_unknown_fields=True):
    name: str
    owner: str
    seconds: float


class _Renew(msgspec.Struct, frozen=True, tag="renew", forbid_unknown_fields=True):
    lease: Lease


class _Release(msgspec.Struct, frozen=True, tag="release", forbid_unknown_fields=True):
    lease: Lease


class _Holder(msgspec.Struct, frozen=True, tag="holder", forbid_unknown_fields=True):
    name: str


_Request = _Get | _List | _Txn | _Watch | _Lock | _Renew | _Release | _Holder


class _Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """`result` as the operation has it; or an error of one of these kinds."""

    result: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""
    message: str = ""
    name: str = ""
    holder: Holder | None = None


class RemoteStore:
    """`call` carries a request there and brings the answer; it raises HandoffError where it cannot."""

    def __init__(self, call: Callable[[bytes], bytes], shown: str) -> None:
        """`shown`: who keeps it, for messages."""
        self._call = call
        self._shown = shown

    def close(self) -> None:
        """What carries the calls belongs to somebody else."""

    def get(self, key: str) -> Entry | None:
        return self._ask(_Get(key), Entry | None)  # type: ignore[arg-type]

    def entries(self, prefix: str) -> list[Entry]:
        return self._ask(_List(prefix), list[Entry])

    def txn(
        self,
        lease: Lease | None,
        compares: Mapping[str, int],
        puts: Mapping[str, bytes],
        deletes: Collection[str] = (),
    ) -> int | None:
        request = _Txn(lease, dict(compares), dict(puts), tuple(deletes))
        return self._ask(request, int | None)  # type: ignore[arg-type]

    def watch(self, prefix: str, after: int, timeout: float) -> list[Entry]:
        while True:
            part = min(timeout, MAXIMUM_WATCH_SECONDS)
            found = self._ask(_Watch(prefix, after, part), list[Entry])
            timeout -= part
            if found or timeout <= 0:
                return found

    def lock(self, name: str, owner: str, seconds: float) -> Lease:
        return self._ask(_Lock(name, owner, seconds), Lease)

    def renew(self, lease: Lease) -> None:
        self._ask(_Renew(lease), None)

    def release(self, lease: Lease) -> None:
        self._ask(_Release(lease), None)

    def holder(self, name: str) -> Holder | None:
        return self._ask(_Holder(name), Holder | None)

    def _ask(self, request: _Request, kind: type[T] | None) -> T:
        try:
            data = self._call(msgspec.json.encode(request))
        except StoreError:
            raise
        except (HandoffError, OSError, TimeoutError) as error:
            why = error.message if isinstance(error, HandoffError) else str(error) or "no answer in time"
            raise StoreError(f"store at {self._shown}: {why}") from None
        try:
            answer = msgspec.json.decode(data, type=_Answer)
            if not answer.error:
                return msgspec.json.decode(answer.result, type=kind)  # type: ignore[arg-type]
        except msgspec.DecodeError as error:
            raise StoreError(f"store at {self._shown}: answers no store's words: {error}") from None
        match answer.error:
            case "locked" if answer.holder is not None:
                raise Locked(answer.name, answer.holder)
            case "fenced":
                raise Fenced(answer.message)
            case "usage":
                raise UsageError(answer.message)
        raise StoreError(f"store at {self._shown}: {answer.message}")


def answer(store: Store, request: bytes) -> bytes:
    """What the keeper answers. Blocks; raises nothing."""
    try:
        found = msgspec.json.decode(request, type=_Request)
        return msgspec.json.encode(_Answer(result=msgspec.Raw(msgspec.json.encode(_done(store, found)))))
    except msgspec.DecodeError as error:
        return msgspec.json.encode(_Answer(error="usage", message=f"store: not a request: {error}"))
    except Locked as error:
        name = found.name if isinstance(found, _Lock) else ""
        return msgspec.json.encode(_Answer(error="locked", message=error.message, name=name, holder=error.holder))
    except Fenced as error:
        return msgspec.json.encode(_Answer(error="fenced", message=error.message))
    except UsageError as error:
        return msgspec.json.encode(_Answer(error="usage", message=error.message))
    except HandoffError as error:
        return msgspec.json.encode(_Answer(error="failed", message=error.message))


def _done(store: Store, request: _Request) -> Any:
    match request:
        case _Get(key):
            return store.get(key)
        case _List(prefix):
            return store.entries(prefix)
        case _Txn(lease, compares, puts, deletes):
            return store.txn(lease, compares, puts, deletes)
        case _Watch(prefix, after, timeout):
            return store.watch(prefix, after, min(timeout, MAXIMUM_WATCH_SECONDS))
        case _Lock(name, owner, seconds):
            return store.lock(name, owner, min(seconds, MAXIMUM_LEASE_SECONDS))
        case _Renew(lease):
            return store.renew(lease)
        case _Release(lease):
            return store.release(lease)
        case _Holder(name):
            return store.holder(name)
