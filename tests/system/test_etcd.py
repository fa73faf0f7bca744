"""A real etcd as the store of rollouts: three nodes of which the leader dies or sleeps; TLS; users."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from handoff.errors import UsageError
from lb.rollout.stores import Lease, Locked, Store, StoreError, open_store
from lb.rollout.stores.access import PASSWORD_VARIABLE, USER_VARIABLE
from tests.system.certificates import certificate
from tests.system.etcd import Cluster, Node, cluster
from tests.system.harness import DEADLINE_SECONDS, wait_until

LONG = 3600.0
CHANGES = 30


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path, 3) as made:
        yield made


def opened(etcd: Cluster, seconds: float = DEADLINE_SECONDS, **environ: str) -> contextlib.closing[Store]:
    return contextlib.closing(open_store(etcd.url, timeout_seconds=seconds, environ=environ))


class Holder:
    """Changes one key again and again under a lease, each time the version before: what was done twice, or not at all,
    would fail."""

    def __init__(self, store: Store, lease: Lease) -> None:
        self._store, self._lease = store, lease
        self.versions: list[int | None] = [0]
        self._errors: list[BaseException] = []
        self._is_under_way = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()
        assert self._is_under_way.wait(DEADLINE_SECONDS)

    def _work(self) -> None:
        try:
            for number in range(CHANGES):
                if number == CHANGES // 3:
                    self._is_under_way.set()
                puts = {"counter": b"%d" % number}
                self.versions.append(self._store.txn(self._lease, {"counter": self.versions[-1] or 0}, puts))
        except BaseException as error:
            self._errors.append(error)
            self._is_under_way.set()

    def end(self) -> None:
        self._thread.join(2 * DEADLINE_SECONDS)
        assert self._errors == []
        assert None not in self.versions
        entry = self._store.get("counter")
        assert entry is not None
        assert (entry.value, entry.version) == (b"%d" % (CHANGES - 1), self.versions[-1])


def test_the_leader_dies_and_who_holds_the_lock_goes_on_until_most_are_gone(three: Cluster) -> None:
    with opened(three) as store, opened(three) as other, opened(three, 1.0) as hasty:
        lease = store.lock("shop", "alice@laptop", LONG)
        holder = Holder(store, lease)
        first = three.leader()
        first.kill()
        holder.end()
        store.renew(lease)
        with pytest.raises(Locked, match="alice@laptop"):
            other.lock("shop", "bob@ci", LONG)
        version = store.txn(lease, {}, {"w": b"1"})
        assert [one.version for one in other.watch("w", 0, DEADLINE_SECONDS)] == [version]

        second = three.leader()
        second.kill()
        with pytest.raises(StoreError, match=r"store etcd 127\.0\.0\.1:\d+,"):
            hasty.txn(lease, {}, {"w": b"2"})
        with pytest.raises(StoreError):
            hasty.get("w")

        three.start(first, second)
        store.renew(lease)
        assert store.txn(lease, {}, {"w": b"3"}) is not None
        found = other.get("w")
        assert found is not None
        assert found.value == b"3"
        store.release(lease)
        assert other.lock("shop", "bob@ci", LONG).token > lease.token


def test_the_leader_sleeps_and_what_it_was_told_before_is_done_once(three: Cluster) -> None:
    leader = three.leader()
    with opened(three) as store:
        lease = store.lock("shop", "alice@laptop", LONG)
        holder = Holder(store, lease)
        leader.signal(signal.SIGSTOP)
        holder.end()
        version = store.txn(lease, {}, {"counter": b"last"})
        leader.signal(signal.SIGCONT)
        wait_until(lambda: own_revision(leader) >= (version or 0), "it has what the others have")
        assert store.get("counter") == ("counter", b"last", version)


def own_revision(node: Node) -> int:
    """As this node knows it, whatever the others do."""
    answer = node.ask("/v3/kv/range", {"key": "eA==", "serializable": True})
    return int(answer.get("header", {}).get("revision", 0))


def test_a_node_that_is_started_again_knows_the_lease(tmp_path: Path) -> None:
    with cluster(tmp_path) as etcd, opened(etcd) as store:
        lease = store.lock("shop", "alice@laptop", LONG)
        version = store.txn(lease, {}, {"a": b"1"})
        node = etcd.nodes[0]
        node.kill()
        with pytest.raises(StoreError, match="Connection refused"):
            store.get("a")
        etcd.start()
        wait_until(node.accepts, "etcd accepts")
        assert store.get("a") == ("a", b"1", version)
        store.renew(lease)
        assert store.txn(lease, {"a": version or 0}, {"a": b"2"}) is not None


def test_over_tls_its_certificate_is_verified(tmp_path: Path) -> None:
    certificate(tmp_path)
    files = ("--cert-file", str(tmp_path / "cert.pem"), "--key-file", str(tmp_path / "key.pem"))
    with cluster(tmp_path, options=files, scheme="https") as etcd:
        places = etcd.url.replace("127.0.0.1", "localhost")
        with contextlib.closing(
            open_store(f"{places}?ca=cert.pem", near=str(tmp_path), timeout_seconds=DEADLINE_SECONDS)
        ) as store:
            lease = store.lock("shop", "alice", LONG)
            version = store.txn(lease, {}, {"a": b"1"})
            assert store.watch("a", 0, 0.0) == [("a", b"1", version)]
            assert store.watch("a", version or 0, 0.1) == []
        with (
            contextlib.closing(open_store(f"{places}?tls=true", timeout_seconds=DEADLINE_SECONDS)) as store,
            pytest.raises(StoreError, match="certificate"),
        ):
            store.get("a")


def test_where_etcd_has_users_ours_logs_in_and_again_when_it_must(tmp_path: Path) -> None:
    with cluster(tmp_path) as etcd:
        node = etcd.nodes[0]
        node.ask("/v3/auth/user/add", {"name": "root", "password": "geheim"})
        node.ask("/v3/auth/role/add", {"name": "root"})
        node.ask("/v3/auth/user/grant", {"user": "root", "role": "root"})
        node.ask("/v3/auth/enable", {})
        with opened(etcd) as store, pytest.raises(StoreError, match="set HANDOFF_ETCD_USER and HANDOFF_ETCD_PASSWORD"):
            store.get("a")
        known = {USER_VARIABLE: "root", PASSWORD_VARIABLE: "geheim"}
        with opened(etcd, **known | {PASSWORD_VARIABLE: "falsch"}) as store:
            with pytest.raises(StoreError, match=r"user root: .*failed") as error:
                store.get("a")
            assert "falsch" not in error.value.message
        with opened(etcd, **known) as store:
            lease = store.lock("shop", "alice", LONG)
            node.kill()  # logins of the simple kind do not outlive it
            etcd.start()
            wait_until(node.accepts, "etcd accepts")
            assert store.txn(lease, {}, {"a": b"1"}) is not None
            assert [one.value for one in store.watch("a", 0, 0.0)] == [b"1"]
        with pytest.raises(UsageError, match="unencrypted"):
            open_store("etcd://etcd.example", environ=known)
