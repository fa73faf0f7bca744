"""A balancer that looks into a real etcd for what rollouts want."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from lb.core.desired import PREFIX, Desired
from lb.rollout.stores import Lease, open_store
from tests.system.balancer import Balancer, backend, config, http_backends
from tests.system.etcd import Cluster, cluster
from tests.system.harness import wait_until

CHECK = 'type = "http"\npath = "/health"\ninterval = "200ms"\nrise = 1'


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path / "etcd") as made:
        yield made


class Wanting:
    """A deployer that says where connections are to go, and asks nobody."""

    def __init__(self, etcd: Cluster) -> None:
        self._store = open_store(etcd.url)
        self._lease: Lease = self._store.lock("deploy/shop", "test", 600.0)

    def want(self, pool: str, percent: int = 100, token: int | None = None) -> None:
        desired = Desired(
            pool=pool, percent=percent, token=token or self._lease.token, who="rollout r1", why="deploy v2"
        )
        version = self._store.txn(self._lease, {}, {f"{PREFIX}shop": msgspec.json.encode(desired)})
        assert version is not None

    def close(self) -> None:
        self._store.close()


def test_what_a_rollout_wants_is_taken_by_watch_and_before_a_start_accepts(tmp_path: Path, etcd: Cluster) -> None:
    with contextlib.closing(Wanting(etcd)) as rollout, http_backends(tmp_path, "one", "two") as backends:
        pools = {"blue": [backend(backends["one"])], "green": [backend(backends["two"])]}
        text = f'[balancer]\ndesired = "{etcd.url}"\n' + config(pools, check=CHECK)

        def percent(balancer: Balancer, pool: str) -> int:
            found: int = balancer.lb_status()["services"]["shop"]["pools"][pool]["percent"]
            return found

        with Balancer(tmp_path, text) as balancer:
            assert balancer.body().startswith("one")
            rollout.want("green", 25)
            wait_until(lambda: percent(balancer, "green") == 25, "the watch tells")
            backends["two"].sick(True)
            wait_until(lambda: balancer.backends()["green/two"]["health"] == "down", "it is seen")
            rollout.want("blue")
            wait_until(lambda: percent(balancer, "blue") == 100, "back")
            rollout.want("green")
            rollout.want("nobody", token=1)  # of a deployer of long ago: it is not taken, and holds nothing up
            backends["two"].sick(False)
            rollout.want("green")
            wait_until(lambda: percent(balancer, "green") == 100, "as soon as the pool is healthy")
            balancer.done("switch", "shop", "blue")
            assert balancer.handoff("reload", "--wait").returncode == 0
            assert percent(balancer, "blue") == 100, "what an operator has switched since stays so"
        with Balancer(tmp_path, text) as balancer:
            assert balancer.body().startswith("one")
        rollout.want("green")
        with Balancer(tmp_path, text) as balancer:
            assert balancer.body().startswith("two"), "the first that is answered"
        etcd.kill()
        with Balancer(tmp_path, text) as balancer:
            assert balancer.body().startswith("two"), "traffic goes on without the store"
            balancer.stderr.wait_for("goes on with what it has")
