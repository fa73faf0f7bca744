"""A store that is somewhere else: each call is one JSON request and its answer, whatever carries them.

`RemoteStore` asks, `answer` answers beside the store. Nothing is asked twice by itself: where an answer is lost, the
caller gets a StoreError and asks again what may be asked again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import TypeAlias, TypeVar

import msgspec

from handoff.errors import ExitCode, HandoffError
from lb.core.admin import Answer
from lb.rollout.stores.base import (
    MAXIMUM_NUMBER,
    Entries,
    Entry,
    Fenced,
    Holder,
    Lease,
    Locked,
    Store,
    StoreError,
    one_line,
    refuse_key,
    refuse_lock,
    refuse_prefix,
    refuse_txn,
    refuse_version,
)

MAXIMUM_REQUEST_BYTES = 2 * 1024 * 1024
"""The largest transaction in base64, with its keys."""
MAXIMUM_ANSWER_BYTES = 8 * 1024 * 1024
PART_BYTES = 2 * 1024 * 1024
"""A list is told in parts of about this size: keys and values."""
WATCH_SECONDS = 5.0
"""A watch is asked for in pieces of this length: what carries it may end what is quiet for long."""
PAUSE_SECONDS = 0.1


class Get(msgspec.Struct, frozen=True, tag="get"):
    key: str


class List(msgspec.Struct, frozen=True, tag="list"):
    prefix: str
    behind: str = ""
    """Only keys after this one."""


class Txn(msgspec.Struct, frozen=True, tag="txn"):
    lease: Lease | None
    compares: dict[str, int]
    puts: dict[str, bytes]
    deletes: list[str]


class Watch(msgspec.Struct, frozen=True, tag="watch"):
    prefix: str
    after: int
    seconds: float


class Lock(msgspec.Struct, frozen=True, tag="lock"):
    name: str
    owner: str
    seconds: float


class Renew(msgspec.Struct, frozen=True, tag="renew"):
    lease: Lease


class Release(msgspec.Struct, frozen=True, tag="release"):
    lease: Lease


class Who(msgspec.Struct, frozen=True, tag="holder"):
    name: str


Request: TypeAlias = Get | List | Txn | Watch | Lock | Renew | Release | Who


class Found(msgspec.Struct, frozen=True, tag="found"):
    entries: list[Entry]
    has_more: bool = False


class Written(msgspec.Struct, frozen=True, tag="written"):
    version: int | None


class Granted(msgspec.Struct, frozen=True, tag="granted"):
    lease: Lease


class Held(msgspec.Struct, frozen=True, tag="held"):
    holder: Holder | None


class Done(msgspec.Struct, frozen=True, tag="done"):
    pass


class IsLocked(msgspec.Struct, frozen=True, tag="locked"):
    name: str
    holder: Holder


class IsFenced(msgspec.Struct, frozen=True, tag="fenced"):
    message: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    message: str
    exit_code: int


Response: TypeAlias = Found | Written | Granted | Held | Done | IsLocked | IsFenced | Failed
_T = TypeVar("_T", Found, Written, Granted, Held, Done)
_REQUEST: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_RESPONSE: msgspec.json.Decoder[Response] = msgspec.json.Decoder(Response)
_NONSENSE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class RemoteStore:
    """`call(request) -> answer` carries both, and raises HandoffError or OSError; how long it may take is its to say,
    `WATCH_SECONDS` at least. `name`: of the place, for messages. close() leaves what carries it alone."""

    def __init__(self, call: Callable[[bytes], bytes], name: str = "remote") -> None:
        self._call = call
        self._name = name

    def get(self, key: str) -> Entry | None:
        refuse_key(key)
        entries = self._ask(Get(key), Found).entries
        self._refuse_strangers(entries, key, "", 0)
        if [one.key for one in entries] not in ([], [key]):
            raise self._nonsense("other entries than the one that was asked for")
        return entries[0] if entries else None

    def list(self, prefix: str) -> Entries:
        refuse_prefix(prefix)
        found: Entries = []
        while True:
            behind = found[-1].key if found else ""
            part = self._ask(List(prefix, behind), Found)
            self._refuse_strangers(part.entries, prefix, behind, 0)
            found += part.entries
            if not part.has_more:
                return found
            if not part.entries:
                raise self._nonsense("a part of a list that has nothing in it")

    def txn(
        self,
        lease: Lease | None,
        compares: Mapping[str, int],
        puts: Mapping[str, bytes],
        deletes: Collection[str] = (),
    ) -> int | None:
        refuse_txn(lease, compares, puts, deletes)
        return self._ask(Txn(lease, dict(compares), dict(puts), [*deletes]), Written).version

    def watch(self, prefix: str, after: int, timeout: float) -> Entries:
        refuse_prefix(prefix)
        refuse_version(f"watch {prefix}", after)
        deadline = time.monotonic() + timeout
        while True:
            began = time.monotonic()
            left = max(deadline - began, 0.0)
            part = self._ask(Watch(prefix, after, min(left, WATCH_SECONDS)), Found)
            self._refuse_strangers(part.entries, prefix, "", after)
            if part.has_more:
                return [one for one in self.list(prefix) if one.version > after]
            if part.entries or time.monotonic() >= deadline:
                return part.entries
            if time.monotonic() - began < WATCH_SECONDS / 2:  # it has ended early: whoever answers is about to stop
                threading.Event().wait(min(deadline - time.monotonic(), PAUSE_SECONDS))

    def lock(self, name: str, owner: str, seconds: float) -> Lease:
        refuse_lock(name, owner, seconds)
        lease = self._ask(Lock(name, owner, seconds), Granted).lease
        if (lease.name, lease.owner) != (name, owner) or not 0 < lease.token <= MAXIMUM_NUMBER:
            raise self._nonsense("a lease of another lock")
        return lease

    def renew(self, lease: Lease) -> None:
        self._ask(Renew(lease), Done)

    def release(self, lease: Lease) -> None:
        self._ask(Release(lease), Done)

    def holder(self, name: str) -> Holder | None:
        refuse_key(name)
        return self._ask(Who(name), Held).holder

    def close(self) -> None:
        pass

    def _ask(self, request: Request, kind: type[_T]) -> _T:
        """Raises what the store raised, and StoreError."""
        try:
            data = self._call(msgspec.json.encode(request))
        except StoreError:
            raise
        except HandoffError as error:
            raise StoreError(f"store {self._name}: {error.message}") from error
        except OSError as error:
            raise StoreError(f"store {self._name}: {one_line(error)}; see that it can be reached") from error
        match self._decoded(data):
            case IsLocked(name, holder):
                raise Locked(name, holder)
            case IsFenced(message):
                raise Fenced(one_line(message))
            case Failed(message, exit_code) if exit_code == ExitCode.REFUSED:
                raise HandoffError(one_line(message), ExitCode.REFUSED)
            case Failed(message):
                raise StoreError(f"{self._name}: {one_line(message)}")
            case found if isinstance(found, kind):
                return found
        raise self._nonsense("an answer to another question")

    def _decoded(self, data: bytes) -> Response:
        if len(data) > MAXIMUM_ANSWER_BYTES:
            raise self._nonsense(f"more than {MAXIMUM_ANSWER_BYTES} bytes")
        try:
            return _RESPONSE.decode(data)
        except _NONSENSE as error:
            why = one_line(error)
        try:
            answer = msgspec.json.decode(data, type=Answer)  # of the admin API, which let nobody in
        except _NONSENSE:
            raise self._nonsense(why) from None
        raise StoreError(f"store {self._name}: {one_line(answer.message)}")

    def _refuse_strangers(self, entries: Entries, prefix: str, behind: str, after: int) -> None:
        keys = [one.key for one in entries]
        if keys != sorted(set(keys)) or any(not key.startswith(prefix) or key <= behind for key in keys):
            raise self._nonsense("other entries than those that were asked for")
        if any(one.version <= after for one in entries):
            raise self._nonsense("entries that are older than what was asked for")

    def _nonsense(self, what: str) -> StoreError:
        remedy = "see that handoff there is of this release"
        return StoreError(f"store {self._name}: its answer cannot be used: {what}; {remedy}")


def answer(store: Store, request: bytes) -> bytes:
    """What a RemoteStore gets for its request. Blocks as the store does, a watch for `WATCH_SECONDS` at most."""
    try:
        return encoded(carry_out(store, decoded(request)))
    except HandoffError as error:
        return encoded(failure(error))


def decoded(request: bytes) -> Request:
    """Raises HandoffError."""
    if len(request) > MAXIMUM_REQUEST_BYTES:
        raise HandoffError(f"store: a request of more than {MAXIMUM_REQUEST_BYTES} bytes", ExitCode.REFUSED)
    try:
        return _REQUEST.decode(request)
    except _NONSENSE as error:
        raise HandoffError(f"store: a request that cannot be used: {one_line(error)}", ExitCode.REFUSED) from None


def encoded(response: Response) -> bytes:
    return msgspec.json.encode(response)


def failure(error: HandoffError) -> Response:
    match error:
        case Locked(name=name, holder=holder):
            return IsLocked(name, holder)
        case Fenced():
            return IsFenced(error.message)
    return Failed(error.message, int(error.exit_code))


def carry_out(store: Store, request: Request) -> Response:
    """Raises HandoffError."""
    match request:
        case Get(key):
            entry = store.get(key)
            return Found([] if entry is None else [entry])
        case List(prefix, behind):
            return _part([one for one in store.list(prefix) if one.key > behind])
        case Txn(lease, compares, puts, deletes):
            return Written(store.txn(lease, compares, puts, deletes))
        case Watch(prefix, after, seconds):
            timeout = min(max(seconds, 0.0), WATCH_SECONDS)
            return _part(store.watch(prefix, after, timeout))
        case Lock(name, owner, seconds):
            return Granted(store.lock(name, owner, seconds))
        case Renew(lease):
            store.renew(lease)
        case Release(lease):
            store.release(lease)
        case Who(name):
            return Held(store.holder(name))
    return Done()


def _part(entries: Entries) -> Found:
    """As many as fit, one at least."""
    size = 0
    for count, entry in enumerate(entries):
        size += len(entry.key) + len(entry.value)
        if count and size > PART_BYTES:
            return Found(entries[:count], has_more=True)
    return Found(entries)
