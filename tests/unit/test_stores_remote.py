"""A store from afar: what is carried, what is not believed, and what an unreachable one costs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from handoff.errors import ExitCode, HandoffError
from lb.rollout.stores import Lease, RemoteStore, SQLiteStore, Store, StoreError, answer
from lb.rollout.stores import remote as remote_module
from lb.rollout.stores.remote import MAXIMUM_ANSWER_BYTES, MAXIMUM_REQUEST_BYTES


@pytest.fixture
def there(tmp_path: Path) -> Iterator[SQLiteStore]:
    with contextlib.closing(SQLiteStore(tmp_path / "store.db")) as store:
        yield store


def answering(data: bytes) -> RemoteStore:
    return RemoteStore(lambda _: data, "lb1")


CALLS: list[Callable[[Store], Any]] = [
    lambda store: store.get("a"),
    lambda store: store.list("a"),
    lambda store: store.txn(Lease("shop", "alice", 1, 1.0), {}, {"a": b""}),
    lambda store: store.watch("a", 1, 0.0),
    lambda store: store.lock("shop", "alice", 1.0),
    lambda store: store.renew(Lease("shop", "alice", 1, 1.0)),
    lambda store: store.release(Lease("shop", "alice", 1, 1.0)),
    lambda store: store.holder("shop"),
]
NONSENSE: list[bytes] = [
    b"",
    b"{}",
    b"null",
    b"[]",
    b"<html>Login</html>",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"type":"other"}',
    b'{"type":"found"}',
    b'{"type":"found","entries":[["b","",2]]}',
    b'{"type":"found","entries":[["a","!",2]]}',
    b'{"type":"found","entries":[["a","",0]],"has_more":true}',
    b'{"type":"found","entries":[["a","",2],["a","",2]]}',
    b'{"type":"found","entries":[],"has_more":true,"x":',
    b'{"type":"granted","lease":["blog","bob",1,1.0]}',
    b'{"type":"granted","lease":["shop","alice",0,1.0]}',
    b'{"type":"written","version":"x"}',
    b" " * (MAXIMUM_ANSWER_BYTES + 1),
]


@pytest.mark.parametrize("data", NONSENSE, ids=lambda data: repr(data[:50]))
@pytest.mark.parametrize("call", CALLS, ids=range(len(CALLS)))
def test_nonsense_is_an_error_in_one_line_and_never_an_answer(call: Callable[[Store], Any], data: bytes) -> None:
    with pytest.raises(StoreError, match=r"store lb1: its answer cannot be used: ") as error:
        call(answering(data))
    assert len(error.value.message) < 600
    assert "\n" not in error.value.message


def test_a_list_that_never_ends_is_none() -> None:
    with pytest.raises(StoreError, match="other entries"):
        answering(b'{"type":"found","entries":[["a","",2]],"has_more":true}').list("a")
    with pytest.raises(StoreError, match="nothing in it"):
        answering(b'{"type":"found","entries":[],"has_more":true}').list("a")


def test_a_refusal_of_the_admin_api_is_told_as_it_is() -> None:
    refusal = b'{"exit_code":9,"message":"this needs the token: Authorization: Bearer TOKEN"}'
    with pytest.raises(StoreError, match="store lb1: this needs the token"):
        answering(refusal).get("a")


@pytest.mark.parametrize(
    ("problem", "match"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "store lb1: .*Connection refused"),
        (TimeoutError("timed out"), "store lb1: timed out"),
        (HandoffError("host lb1: ssh cannot reach it"), "store lb1: host lb1: ssh cannot reach it"),
    ],
)
@pytest.mark.parametrize("call", CALLS, ids=range(len(CALLS)))
def test_what_cannot_be_reached_is_told_and_asked_once(
    call: Callable[[Store], Any], problem: Exception, match: str
) -> None:
    asked = []

    def fail(request: bytes) -> bytes:
        asked.append(request)
        raise problem

    with pytest.raises(StoreError, match=match):
        call(RemoteStore(fail, "lb1"))
    assert len(asked) == 1


def test_a_broken_store_there_is_told_here(there: SQLiteStore) -> None:
    there.close()
    with pytest.raises(StoreError, match=r"lb1: store /.*store\.db: was closed"):
        RemoteStore(lambda request: answer(there, request), "lb1").get("a")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"type":"drop"}',
        b'{"type":"get"}',
        b'{"type":"get","key":"a b"}',
        b'{"type":"list","prefix":"\\u0000"}',
        b'{"type":"txn","lease":null,"compares":{},"puts":{"a":""},"deletes":[]}',
        b'{"type":"txn","lease":null,"compares":{"free/a":9223372036854775808},"puts":{},"deletes":[]}',
        b'{"type":"txn","lease":null,"compares":{},"puts":{"free/a":"!"},"deletes":[]}',
        b'{"type":"watch","prefix":"","after":9223372036854775808,"seconds":0}',
        b'{"type":"lock","name":"shop","owner":"a\\nb","seconds":1}',
        b'{"type":"lock","name":"shop","owner":"a","seconds":1e300}',
        b" " * (MAXIMUM_REQUEST_BYTES + 1),
    ],
    ids=lambda data: repr(data[:50]),
)
def test_a_bad_request_is_refused_in_one_line(there: SQLiteStore, request_bytes: bytes) -> None:
    said = json.loads(answer(there, request_bytes))
    assert (said["type"], said["exit_code"]) == ("failed", ExitCode.REFUSED)
    assert said["message"].startswith("store: ")
    assert "\n" not in said["message"]
    assert there.list("") == []


def test_tokens_of_any_size_are_refused_not_crashed_upon(there: SQLiteStore) -> None:
    for token in (-(2**63), 0, 2**63, 2**64 - 1):
        request = {"type": "renew", "lease": ["shop", "alice", token, 1.0]}
        assert json.loads(answer(there, json.dumps(request).encode()))["type"] == "fenced"


def test_a_watch_is_asked_for_in_pieces(there: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "WATCH_SECONDS", 0.05)
    asked = []

    def call(request: bytes) -> bytes:
        asked.append(json.loads(request)["seconds"])
        if len(asked) == 4:
            there.txn(None, {}, {"free/a": b"1"})
        return answer(there, request)

    found = RemoteStore(call).watch("free/", 0, 600.0)
    assert [one.value for one in found] == [b"1"]
    assert asked == [0.05] * 4


def test_a_watch_of_much_is_whole(there: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "PART_BYTES", 100)
    first = there.txn(None, {}, {f"free/{number}": b"x" * 60 for number in range(5)})
    there.txn(None, {}, {f"free/{number}": b"x" * 60 for number in range(5, 9)})
    store = RemoteStore(lambda request: answer(there, request))
    assert [one.key for one in store.watch("free/", first or 0, 0.0)] == [f"free/{number}" for number in range(5, 9)]
    assert len(store.list("free/")) == 9
