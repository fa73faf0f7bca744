"""What every store does, held to by all of them: SQLite, SQLite from afar, and a real etcd."""

from __future__ import annotations

import base64
import itertools
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from handoff.errors import ExitCode, HandoffError
from lb.rollout.stores import (
    Fenced,
    Lease,
    Locked,
    RemoteStore,
    SQLiteStore,
    Store,
    StoreError,
    answer,
    open_store,
)
from lb.rollout.stores.base import MAXIMUM_OPERATIONS, MAXIMUM_VALUE_BYTES
from lb.rollout.stores.sqlite import since_boot
from tests.system.etcd import Cluster, cluster
from tests.system.harness import DEADLINE_SECONDS, wait_until

LONG = 3600.0
"""Of leases that do not end by themselves here."""


class Place:
    """A store's place: any number of clients, and leases that end when a test says so."""

    def __init__(self) -> None:
        self._opened: list[Store] = []

    def open(self) -> Store:
        self._opened.append(self._open())
        return self._opened[-1]

    def close(self) -> None:
        for store in self._opened:
            store.close()

    def _open(self) -> Store:
        raise NotImplementedError

    def end(self, lease: Lease) -> None:
        """As time does."""
        raise NotImplementedError

    url = ""
    """What other processes open."""


class SQLitePlace(Place):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._passed = 0.0
        self.url = f"sqlite:{path}"

    def _open(self) -> Store:
        return SQLiteStore(self._path, clock=lambda: since_boot() + self._passed)

    def end(self, lease: Lease) -> None:
        self._passed += lease.seconds


class RemotePlace(SQLitePlace):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._there = super()._open()
        self.url = ""

    def _open(self) -> Store:
        return RemoteStore(lambda request: answer(self._there, request))

    def close(self) -> None:
        super().close()
        self._there.close()


class EtcdPlace(Place):
    def __init__(self, etcd: Cluster, prefix: str) -> None:
        super().__init__()
        self._node, self._prefix = etcd.nodes[0], prefix
        self.url = f"{etcd.url}?prefix={prefix}"

    def _open(self) -> Store:
        return open_store(self.url, timeout_seconds=DEADLINE_SECONDS)

    def end(self, lease: Lease) -> None:
        key = base64.b64encode(f"{self._prefix}lock/{lease.name}".encode()).decode()
        found = self._node.ask("/v3/kv/range", {"key": key})["kvs"][0]
        self._node.ask("/v3/lease/revoke", {"ID": found["lease"]})


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("etcd")) as made:
        yield made


NUMBERS = itertools.count()


@pytest.fixture(params=["sqlite", "remote", "etcd"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    made: Place
    match request.param:
        case "sqlite":
            made = SQLitePlace(tmp_path / "dir" / "store.db")
        case "remote":
            made = RemotePlace(tmp_path / "store.db")
        case _:
            made = EtcdPlace(request.getfixturevalue("etcd"), f"test{next(NUMBERS)}/")
    yield made
    made.close()


@pytest.fixture
def store(place: Place) -> Store:
    return place.open()


@pytest.fixture
def lease(store: Store) -> Lease:
    return store.lock("shop", "alice@laptop", LONG)


# --- entries --------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_with_a_version_that_grows_over_all_keys(store: Store, lease: Lease) -> None:
    assert store.get("a") is None
    assert store.list("") == []
    first = store.txn(lease, {}, {"a": b"1", "b/x": b"\x00\xff"})
    assert first is not None
    assert first > 0
    assert store.get("a") == ("a", b"1", first)
    second = store.txn(lease, {}, {"b/y": b""})
    assert second is not None
    assert second > first
    assert store.list("b/") == [("b/x", b"\x00\xff", first), ("b/y", b"", second)]
    assert [one.key for one in store.list("")] == ["a", "b/x", "b/y"]
    assert store.list("b/z") == []


def test_every_client_sees_what_one_wrote(place: Place, store: Store, lease: Lease) -> None:
    version = store.txn(lease, {}, {"a": b"1"})
    assert place.open().get("a") == ("a", b"1", version)


def test_a_list_is_sorted_and_complete_whatever_its_length(store: Store, lease: Lease) -> None:
    big = b"x" * (MAXIMUM_VALUE_BYTES // 50)
    keys = [f"many/{number:03}" for number in range(250)]
    for at in range(0, 250, 50):
        store.txn(lease, {}, dict.fromkeys(reversed(keys[at : at + 50]), big))
    store.txn(lease, {}, {"many": b"", "many0": b"", "man/y": b""})
    found = store.list("many/")
    assert [one.key for one in found] == keys
    assert {one.value for one in found} == {big}


def test_a_transaction_is_done_where_all_versions_are_as_named(store: Store, lease: Lease) -> None:
    first = store.txn(lease, {"a": 0}, {"a": b"1"})
    assert first is not None
    assert store.txn(lease, {"a": 0}, {"a": b"2"}) is None
    second = store.txn(lease, {"a": first, "b": 0}, {"a": b"2", "b": b"1"})
    assert second is not None
    assert store.txn(lease, {"a": first}, {"a": b"3"}) is None
    assert store.txn(lease, {"a": second, "b": first}, {"a": b"3", "c": b"3"}) is None
    assert [(one.key, one.value) for one in store.list("")] == [("a", b"2"), ("b", b"1")]
    third = store.txn(lease, {"a": second}, {"c": b"3"}, deletes=["a", "nothing"])
    assert third is not None
    assert [one.key for one in store.list("")] == ["b", "c"]
    assert store.txn(lease, {"a": 0}, {"a": b"again"}) is not None
    assert store.txn(lease, {"b": second}, {}) is not None
    assert store.txn(lease, {"b": third}, {}) is None


def test_without_a_lock_only_free_keys_are_written(store: Store) -> None:
    first = store.txn(None, {"free/shop/request": 0}, {"free/shop/request": b"pause"})
    assert first is not None
    assert store.txn(None, {"free/shop/request": 0}, {"free/shop/request": b"abort"}) is None
    assert store.txn(None, {"free/shop/request": first}, {}, ["free/shop/request"]) is not None
    for compares, puts, deletes in (({}, {"a": b""}, []), ({"a": 0}, {"free/a": b""}, []), ({}, {}, ["a"])):
        with pytest.raises(HandoffError, match="written under a lock only") as refused:
            store.txn(None, compares, puts, deletes)
        assert refused.value.exit_code == ExitCode.REFUSED
    assert store.list("") == []


@pytest.mark.parametrize("key", ["", "a b", "ä", "a\n", "x" * 257, "a*"])
def test_keys_that_are_none_are_refused(store: Store, lease: Lease, key: str) -> None:
    for call in (
        lambda: store.get(key),
        lambda: store.txn(lease, {}, {key: b""}),
        lambda: store.txn(lease, {key: 0}, {}),
        lambda: store.txn(lease, {}, {}, [key]),
        lambda: store.lock(key, "bob", 1),
        lambda: store.holder(key),
    ):
        with pytest.raises(HandoffError, match="use 1 to 256 of letters") as refused:
            call()
        assert refused.value.exit_code == ExitCode.REFUSED
        assert "\n" not in refused.value.message


def test_keys_and_values_up_to_their_bounds_are_taken(store: Store, lease: Lease) -> None:
    key, value = "k" * 256, bytes(range(256)) * (MAXIMUM_VALUE_BYTES // 256)
    version = store.txn(lease, {}, {key: value})
    assert store.get(key) == (key, value, version)
    assert store.list("k") == [(key, value, version)]
    assert store.watch("k", 0, 0.0) == [(key, value, version)]
    for puts in ({key: value + b"x"}, {"a": value, "b": b"x"}):
        with pytest.raises(HandoffError, match="1048577 bytes of values; 1048576 are taken"):
            store.txn(lease, {}, puts)
    full = {f"{number:0256}": b"x" for number in range(MAXIMUM_OPERATIONS)}
    assert store.txn(lease, {}, full) is not None
    with pytest.raises(HandoffError, match="101 operations; 100 are taken"):
        store.txn(lease, {"a": 0}, full)
    with pytest.raises(HandoffError, match="named twice"):
        store.txn(lease, {}, {"a": b""}, ["a"])
    with pytest.raises(HandoffError, match="expected 0 to"):
        store.txn(lease, {"a": 2**63}, {})


def test_a_watch_tells_what_changed_after_a_version_and_not_what_was_deleted(store: Store, lease: Lease) -> None:
    first = store.txn(lease, {}, {"w/a": b"1", "w/b": b"1", "v": b"1"})
    assert first is not None
    assert [one.key for one in store.watch("w/", 0, 0.0)] == ["w/a", "w/b"]
    assert store.watch("w/", first, 0.0) == []
    second = store.txn(lease, {}, {"w/a": b"2"})
    assert second is not None
    store.txn(lease, {}, {"w/a": b"3"})
    assert [(one.key, one.value) for one in store.watch("w/", first, LONG)] == [("w/a", b"3")]
    last = store.txn(lease, {}, {}, ["w/a", "w/b"])
    assert last is not None
    assert store.watch("w/", first, 0.0) == []


def test_a_watch_that_waits_hears_of_another_clients_change(place: Place, store: Store, lease: Lease) -> None:
    begin = store.txn(lease, {}, {"w/a": b"1"})
    assert begin is not None
    found: list[list[tuple[str, bytes]]] = []
    other = place.open()
    watching = threading.Thread(
        target=lambda: found.append([(one.key, one.value) for one in other.watch("w/", begin, DEADLINE_SECONDS)])
    )
    watching.start()
    store.txn(lease, {}, {"elsewhere": b""})
    store.txn(lease, {}, {}, ["w/a"])
    store.txn(lease, {}, {"w/b": b"2"})
    watching.join(2 * DEADLINE_SECONDS)
    assert found == [[("w/b", b"2")]]


def test_a_watch_ends_when_its_time_is_over(store: Store) -> None:
    assert store.watch("", 0, 0.3) == []


# --- locks ----------------------------------------------------------------------------------------------------------


def test_a_lock_has_one_holder_and_the_others_hear_who_it_is(place: Place, store: Store) -> None:
    assert store.holder("shop") is None
    lease = store.lock("shop", "alice@laptop", LONG)
    assert (lease.name, lease.owner, lease.seconds) == ("shop", "alice@laptop", LONG)
    other = place.open()
    with pytest.raises(Locked) as locked:
        other.lock("shop", "bob@ci", LONG)
    held = locked.value.holder
    assert (held.owner, held.token) == ("alice@laptop", lease.token)
    assert held.since < held.until <= held.since + 2 * LONG
    assert locked.value.exit_code == ExitCode.LOCKED
    assert "lock shop: is held by alice@laptop since 20" in locked.value.message
    assert ", until 20" in locked.value.message
    found = other.holder("shop")
    assert found is not None
    assert (found.owner, found.token, found.since) == (held.owner, held.token, held.since)
    with pytest.raises(Locked):
        store.lock("shop", "alice@laptop", LONG)  # it is nobody's twice
    assert other.lock("blog", "bob@ci", LONG).owner == "bob@ci"


def test_tokens_grow_with_every_lock_of_a_name(place: Place, store: Store) -> None:
    tokens = []
    for number in range(4):
        lease = store.lock("shop", f"owner{number}", LONG)
        tokens.append(lease.token)
        if number % 2:
            store.release(lease)
        else:
            place.end(lease)
    assert tokens == sorted(set(tokens))
    assert tokens[0] > 0


def test_a_released_lease_writes_nothing_more(place: Place, store: Store, lease: Lease) -> None:
    store.txn(lease, {}, {"a": b"1"})
    store.release(lease)
    assert store.holder("shop") is None
    with pytest.raises(Fenced, match="has ended") as refused:
        store.txn(lease, {}, {"a": b"2"})
    assert refused.value.exit_code == ExitCode.ABORTED
    with pytest.raises(Fenced):
        store.renew(lease)
    store.release(lease)
    entry = store.get("a")
    assert entry is not None
    assert entry.value == b"1"
    place.open().lock("shop", "bob@ci", LONG)
    store.release(lease)  # it is not ours any more
    assert store.holder("shop") is not None


def test_an_expired_lease_writes_nothing_more(place: Place, store: Store, lease: Lease) -> None:
    place.end(lease)
    assert store.holder("shop") is None
    with pytest.raises(Fenced, match="nobody has taken the lock since"):
        store.txn(lease, {}, {"a": b"2"})
    with pytest.raises(Fenced):
        store.txn(lease, {}, {})
    with pytest.raises(Fenced):
        store.renew(lease)
    store.release(lease)
    assert store.get("a") is None


def test_who_slept_past_the_lease_is_fenced_after_another_took_the_lock(
    place: Place, store: Store, lease: Lease
) -> None:
    other = place.open()
    store.txn(lease, {}, {"a": b"alice"})
    place.end(lease)
    taken = other.lock("shop", "bob@ci", LONG)
    assert taken.token > lease.token
    with pytest.raises(Fenced, match=r"our lease has ended .*; bob@ci has the lock since 20"):
        store.txn(lease, {}, {"a": b"late"})
    with pytest.raises(Fenced):
        store.txn(lease, {"a": 0}, {"a": b"late"})  # also where a compare fails as well
    with pytest.raises(Fenced, match="bob@ci has the lock"):
        store.renew(lease)
    store.release(lease)
    assert other.txn(taken, {}, {"a": b"bob"}) is not None
    entry = store.get("a")
    assert entry is not None
    assert entry.value == b"bob"


def test_a_lower_or_an_invented_token_is_refused(store: Store, lease: Lease) -> None:
    for token in (0, -1, lease.token - 1, lease.token + 1, 2**62):
        with pytest.raises(Fenced):
            store.txn(lease._replace(token=token), {}, {"a": b""})
        with pytest.raises(Fenced):
            store.renew(lease._replace(token=token))
        store.release(lease._replace(token=token))
    with pytest.raises(Fenced):
        store.txn(lease._replace(name="blog"), {}, {"a": b""})
    assert store.txn(lease, {}, {"a": b""}) is not None


def test_a_renewed_lease_goes_on(place: Place, store: Store, lease: Lease) -> None:
    store.renew(lease)
    place.open().renew(lease)
    with pytest.raises(Locked):
        place.open().lock("shop", "bob@ci", LONG)
    assert store.txn(lease, {}, {"a": b""}) is not None


def test_two_clients_write_under_one_lease(place: Place, store: Store, lease: Lease) -> None:
    other = place.open()
    versions = [client.txn(lease, {}, {"a": b"x"}) for client in (store, other, other, store, store)]
    assert versions == sorted(set(versions), key=versions.index)
    entry = other.get("a")
    assert entry is not None
    assert entry.version == versions[-1]


@pytest.mark.parametrize(("owner", "seconds"), [("", 1), ("a\nb", 1), ("x" * 201, 1), ("a", 0), ("a", -1), ("a", 1e9)])
def test_owners_and_leases_that_are_none_are_refused(store: Store, owner: str, seconds: float) -> None:
    with pytest.raises(HandoffError, match="lock shop: ") as refused:
        store.lock("shop", owner, seconds)
    assert refused.value.exit_code == ExitCode.REFUSED


def test_a_closed_store_says_so(place: Place, store: Store) -> None:
    if isinstance(store, RemoteStore):
        store, store_there = place._there, store  # type: ignore[attr-defined]
        assert store_there.get("a") is None
    store.close()
    store.close()
    with pytest.raises(StoreError, match="was closed"):
        store.get("a")


# --- several processes ----------------------------------------------------------------------------------------------

RACER = """
import sys
from lb.rollout.stores import Fenced, Locked, open_store
store = open_store(sys.argv[1], timeout_seconds=60)
lease = None
for line in sys.stdin:
    word, _, rest = line.strip().partition(" ")
    try:
        if word == "lock":
            lease = store.lock("shop", sys.argv[2], float(rest))
            said = f"won {lease.token}"
        elif word == "release":
            store.release(lease)
            said = "released"
        elif word == "write":
            said = f"wrote {store.txn(lease, {}, {'a': sys.argv[2].encode()})}"
        else:
            for _ in range(int(rest)):
                while True:
                    entry = store.get("free/count")
                    value, version = (int(entry.value), entry.version) if entry else (0, 0)
                    if store.txn(None, {"free/count": version}, {"free/count": b"%d" % (value + 1)}):
                        break
            said = "counted"
    except Locked as error:
        said = "locked"
    except Fenced as error:
        said = f"fenced {error}"
    print(said, flush=True)
"""


IN_PROCESSES = pytest.mark.parametrize("place", ["sqlite", "etcd"], indirect=True)


class Racer:
    def __init__(self, url: str, name: str) -> None:
        words = [sys.executable, "-c", RACER, url, name]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n")

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def racers(place: Place) -> Iterator[list[Racer]]:
    made = [Racer(place.url, name) for name in ("alice", "bob")]
    yield made
    for one in made:
        one.end()


@IN_PROCESSES
def test_of_two_processes_that_race_for_a_lock_exactly_one_has_it(racers: list[Racer]) -> None:
    tokens = []
    for _ in range(40):
        for racer in racers:
            racer.say(f"lock {LONG}")
        heard = [racer.hear() for racer in racers]
        assert sorted(said.split()[0] for said in heard) == ["locked", "won"]
        winner = next(racer for racer, said in zip(racers, heard, strict=True) if said.startswith("won"))
        tokens += [int(said.split()[1]) for said in heard if said.startswith("won")]
        winner.say("release")
        assert winner.hear() == "released"
    assert tokens == sorted(set(tokens))


@IN_PROCESSES
def test_of_two_processes_that_count_none_loses_a_change(store: Store, racers: list[Racer]) -> None:
    for racer in racers:
        racer.say("count 40")
    assert [racer.hear() for racer in racers] == ["counted", "counted"]
    entry = store.get("free/count")
    assert entry is not None
    assert entry.value == b"80"


@IN_PROCESSES
def test_a_process_that_was_stopped_past_its_lease_is_fenced(store: Store, racers: list[Racer]) -> None:
    """With real time: nothing is to happen within it."""
    alice, bob = racers
    alice.say("lock 1")
    assert alice.hear().startswith("won ")
    alice.process.send_signal(signal.SIGSTOP)

    def bob_has_it() -> bool:
        bob.say(f"lock {LONG}")
        return bob.hear().startswith("won")

    wait_until(bob_has_it, "the lease has ended")
    alice.say("write")
    alice.process.send_signal(signal.SIGCONT)
    assert "bob has the lock since" in alice.hear()
    bob.say("write")
    assert bob.hear().startswith("wrote ")
    entry = store.get("a")
    assert entry is not None
    assert entry.value == b"bob"
