"""The store in etcd, against gateways that are none, or sick: bounded, and told in one line."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from handoff.errors import UsageError
from lb.rollout.stores import EtcdStore, Lease, Store, StoreError
from lb.rollout.stores import gateway as gateway_module
from lb.rollout.stores.access import Access, access_from
from tests.system.harness import DEADLINE_SECONDS
from tests.unit.lb_harness import closed_port

SECONDS = 0.15
"""For a call of what does not answer."""
HEADER = {"cluster_id": "7", "member_id": "1", "revision": "5"}

Answering = Callable[[str, dict[str, Any]], bytes]


def http(body: Any, status: str = "200 OK") -> bytes:
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


class FakeGateway:
    """Answers each request with bytes, whatever they are; `asked` has paths and bodies."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection, connection.makefile("rb") as file, contextlib.suppress(OSError):
                if self._has_ended.is_set():
                    return
                path = file.readline().split()[1].decode()
                length = 0
                while line := file.readline().strip().lower():
                    if line.startswith(b"content-length:"):
                        length = int(line.split()[1])
                body = msgspec.json.decode(file.read(length))
                self.asked.append((path, body))
                connection.sendall(self._answering(path, body))

    def end(self) -> None:
        self._has_ended.set()
        socket.create_connection(("127.0.0.1", self.port)).close()
        self._thread.join(DEADLINE_SECONDS)
        self._listener.close()


class Clock:
    """The gateways' client's; `jump` ends its time for what it is at."""

    def __init__(self) -> None:
        self._passed = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self._passed

    def jump(self) -> None:
        self._passed += 2 * DEADLINE_SECONDS


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(gateway_module, "time", made)
    return made


def last(clock: Clock, data: bytes) -> Answering:
    """Nothing is asked after it."""

    def answer(path: str, body: dict[str, Any]) -> bytes:
        clock.jump()
        return data

    return answer


@contextlib.contextmanager
def gateways(*answering: Answering, seconds: float = DEADLINE_SECONDS) -> Iterator[tuple[EtcdStore, list[FakeGateway]]]:
    made = [FakeGateway(one) for one in answering]
    store = EtcdStore(access([one.port for one in made]), seconds)
    try:
        yield store, made
    finally:
        store.close()
        for one in made:
            one.end()


def access(ports: list[int], **environ: str) -> Access:
    return access_from("etcd://" + ",".join(f"127.0.0.1:{port}" for port in ports), ".", environ)


LEASE = Lease("shop", "alice", 1, 1.0)
CALLS: list[Callable[[Store], Any]] = [
    lambda store: store.get("a"),
    lambda store: store.list("a"),
    lambda store: store.txn(LEASE, {}, {"a": b""}),
    lambda store: store.txn(None, {"free/a": 0}, {"free/a": b""}),
    lambda store: store.watch("a", 1, 0.0),
    lambda store: store.lock("shop", "alice", 1.0),
    lambda store: store.renew(LEASE),
    lambda store: store.release(LEASE),
    lambda store: store.holder("shop"),
]
BAD_KEY = {"key": "b3RoZXI=", "mod_revision": "2"}
NONSENSE = [
    b"",
    b"garbage\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{",
    http(b""),
    http({}),
    http([]),
    http(b"<html>"),
    http(b"\xff\xfe"),
    http(b"[" * 100_000),
    http({"header": {"cluster_id": "x"}}),
    http({"header": HEADER, "kvs": 1, "responses": 1, "result": 1}),
    http(b"<html>gone</html>", "301 Moved\r\nLocation: http://127.0.0.1:1/"),
    http(b"<html>502</html>", "502 Bad Gateway"),
    http(b"", "401 Unauthorized"),
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
]


@pytest.mark.parametrize("data", NONSENSE, ids=lambda data: repr(data[:60]))
def test_nonsense_is_an_error_in_one_line_and_never_an_answer(data: bytes, clock: Clock) -> None:
    with gateways(last(clock, data)) as (store, _):
        for call in CALLS:
            with pytest.raises(StoreError, match=r"store etcd 127\.0\.0\.1:\d+: ") as error:
                call(store)
            assert "\n" not in error.value.message
            assert len(error.value.message) < 800


def test_answers_to_other_questions_are_none() -> None:
    with gateways(lambda *_: http({"header": HEADER, "kvs": [BAD_KEY], "responses": []})) as (store, _):
        for call in CALLS[:2]:
            with pytest.raises(StoreError, match="another key"):
                call(store)
        for call in CALLS[5:]:
            with pytest.raises(StoreError, match="lacks what was asked for"):
                call(store)


def test_too_long_an_answer_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "MAXIMUM_ANSWER_BYTES", 10_000)
    with (
        gateways(lambda *_: http({"header": HEADER, "x": "y" * 20_000})) as (store, _),
        pytest.raises(StoreError, match="more than 10000 bytes"),
    ):
        store.get("a")


def test_somebody_elses_value_at_our_lock_is_told() -> None:
    kv = {"key": "eA==", "mod_revision": "2", "value": "eA=="}
    done = {"header": HEADER, "responses": [{"response_range": {}}, {"response_range": {"kvs": [kv]}}]}
    with gateways(lambda *_: http(done)) as (store, _), pytest.raises(StoreError, match="is none of handoff's"):
        store.holder("shop")


class Silent:
    """Accepts, reads, and says nothing, or a byte now and then, until the test ends."""

    def __init__(self, trickle: bytes = b"") -> None:
        self._trickle = trickle
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._ended = threading.Event()
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            self._open.append(connection)
            if self._ended.is_set():
                return
            if self._trickle:
                self._threads.append(threading.Thread(target=self._drip, args=(connection,)))
                self._threads[-1].start()

    def _drip(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not self._ended.wait(0.02):
                connection.send(self._trickle)

    def end(self) -> None:
        self._ended.set()
        socket.create_connection(("127.0.0.1", self.port)).close()
        for thread in self._threads:
            thread.join(DEADLINE_SECONDS)
        for connection in self._open:
            connection.close()
        self._listener.close()


@pytest.mark.parametrize("trickle", [b"", b"X", b"HTTP/1.1 200 OK\r\n"], ids=["nothing", "bytes", "lines"])
def test_who_never_ends_an_answer_holds_nobody_up(trickle: bytes) -> None:
    silent = Silent(trickle)
    store = EtcdStore(access([silent.port]), SECONDS)
    try:
        for call in CALLS[::3]:
            with pytest.raises(StoreError):
                call(store)
    finally:
        store.close()
        silent.end()


def test_where_nobody_listens_all_endpoints_are_named_at_once() -> None:
    ports = [closed_port(), closed_port()]
    store = EtcdStore(access(ports), 3600.0)
    for call in CALLS:
        with pytest.raises(StoreError) as error:
            call(store)
        for port in ports:
            assert f"127.0.0.1:{port}: Connection refused" in error.value.message


def test_a_name_that_is_none_is_told() -> None:
    store = EtcdStore(access_from("etcd://no-such-host.invalid", ".", {}), 30.0)
    with pytest.raises(StoreError, match=r"no-such-host\.invalid:2379: "):
        store.get("a")


def test_a_name_whose_server_does_not_answer_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: ended.wait(DEADLINE_SECONDS) and [])
    store = EtcdStore(access_from("etcd://slow.example", ".", {}), SECONDS)
    with pytest.raises(StoreError, match="no answer in time"):
        store.get("a")
    ended.set()


EMPTY = http({"header": HEADER})
NO_LEADER = http({"error": "etcdserver: no leader", "message": "etcdserver: no leader", "code": 14}, "503 No")


def test_another_endpoint_is_asked_and_remembered() -> None:
    with gateways(lambda *_: NO_LEADER, lambda *_: EMPTY) as (store, (first, second)):
        assert store.get("a") is None
        assert store.get("b") is None
    assert (len(first.asked), len(second.asked)) == (1, 2)


def test_what_may_pass_is_asked_again() -> None:
    answers = [NO_LEADER, NO_LEADER, b"", EMPTY]
    with gateways(lambda *_: answers.pop(0)) as (store, _):
        assert store.get("a") is None
    assert answers == []


def test_without_a_leader_it_says_what_is_missing(clock: Clock) -> None:
    with gateways(last(clock, NO_LEADER)) as (store, _), pytest.raises(StoreError, match="more than half of its nodes"):
        store.get("a")


def test_a_gateway_that_may_speak_tls_only_is_suspected(clock: Clock) -> None:
    with gateways(last(clock, b"")) as (store, _), pytest.raises(StoreError, match=r"add \?tls=true"):
        store.get("a")


def test_what_will_not_pass_is_asked_once() -> None:
    full = http({"message": "etcdserver: mvcc: database space exceeded", "code": 8}, "429 Too Many Requests")
    with gateways(lambda *_: full, seconds=3600.0) as (store, (gateway,)):
        with pytest.raises(StoreError, match="refuses it: etcdserver: mvcc: database space exceeded"):
            store.txn(None, {}, {"free/a": b""})
        assert len(gateway.asked) == 1


def test_a_free_change_with_a_condition_is_not_sent_twice() -> None:
    with gateways(lambda *_: b"", lambda *_: EMPTY, seconds=3600.0) as (store, (first, second)):
        with pytest.raises(StoreError, match="not known whether the change was made"):
            store.txn(None, {"free/a": 0}, {"free/a": b""})
        assert (len(first.asked), len(second.asked)) == (1, 0)


def test_a_change_whose_answer_was_lost_is_found_done() -> None:
    """The first try was carried out; the second finds its mark, and is no failed compare."""
    marks: list[str] = []

    def answer(path: str, body: dict[str, Any]) -> bytes:
        if path == "/v3/kv/range":
            return EMPTY
        marks.append(body["success"][0]["request_put"]["value"])
        if len(marks) == 1:
            return b""
        lock = {"key": "bA==", "value": "MQ==", "mod_revision": "3"}
        last = {"key": "bQ==", "value": marks[0], "mod_revision": "9"}
        ranges = [{"response_range": {"kvs": [kv]}} for kv in (lock, last)]
        return http({"header": {**HEADER, "revision": "12"}, "responses": ranges})

    with gateways(answer) as (store, _):
        assert store.txn(LEASE, {"a": 0}, {"a": b""}) == 9
    assert marks == [marks[0]] * 2


def test_an_endpoint_of_another_cluster_is_not_believed() -> None:
    answers = [EMPTY]
    other = http({"header": {**HEADER, "cluster_id": "8"}})
    with gateways(lambda *_: answers.pop(0) if answers else http(b""), lambda *_: other) as (store, _):
        assert store.get("a") is None
        with pytest.raises(StoreError, match="belongs to another cluster"):
            store.get("a")


# --- URLs -----------------------------------------------------------------------------------------------------------


def test_endpoints_have_etcds_port_unless_they_say_another() -> None:
    found = access_from("etcd://h1,h2:99,[::1],[::1]:7", ".", {})
    assert [tuple(one) for one in found.endpoints] == [("h1", 2379), ("h2", 99), ("::1", 2379), ("::1", 7)]
    assert str(found) == "etcd h1:2379,h2:99,[::1]:2379,[::1]:7"
    assert (found.prefix, found.tls, found.user) == ("handoff/", None, "")


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("etcd://", "endpoint ''"),
        ("etcd://h1,,h2", "endpoint ''"),
        ("etcd://h1:0", "endpoint 'h1:0'"),
        ("etcd://h1:99999", "endpoint"),
        ("etcd://::1", "an IPv6 address in"),
        ("etcd://h 1", "endpoint"),
        ("etcd://" + ",".join(["h"] * 17), "17 endpoints; 16 are taken"),
        ("etcd://h?tsl=true", "unknown option 'tsl'; there are tls, ca"),
        ("etcd://h?tls=yes", "expected true or false"),
        ("etcd://h?tls=false&ca=x", "ca without tls"),
        ("etcd://h?key=x", "add cert=FILE"),
        ("etcd://h?ca=/nowhere", "ca /nowhere: cannot be used"),
        ("etcd://h?prefix=shop", "with / at its end"),
        ("etcd://u:p@h", "set HANDOFF_ETCD_USER"),
    ],
)
def test_what_is_wrong_with_a_url_is_said(url: str, match: str) -> None:
    with pytest.raises(UsageError, match=match) as error:
        access_from(url, ".", {})
    assert "u:p" not in error.value.message


def test_a_password_is_neither_sent_in_the_clear_nor_shown() -> None:
    environ = {"HANDOFF_ETCD_USER": "deploy", "HANDOFF_ETCD_PASSWORD": "geheim"}
    with pytest.raises(UsageError, match="would be sent unencrypted; add") as error:
        access_from("etcd://h1,localhost", ".", environ)
    found = access_from("etcd://h1,localhost?tls=true", ".", environ)
    assert (found.user, found.password) == ("deploy", "geheim")
    for text in (error.value.message, repr(found), str(found)):
        assert "geheim" not in text
    assert access_from("etcd://localhost,127.0.0.1,[::1]", ".", environ).user == "deploy"
