"""Rolling rollouts over several hosts, each with an address of its own, under strict clients."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest

from tests.system.fleet import PORT, Fleet, Spot
from tests.system.harness import wait_until
from tests.system.strict import StrictClients

pytestmark = pytest.mark.timeout(300)


def test_in_place_no_request_fails_and_no_connection_is_closed(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        spots = [fleet.spot(f"web{number}") for number in (1, 2, 3)]
        for name in ("lb1", "lb2"):
            fleet.balancer(name, {"main": spots})
        fleet.start()
        fleet.write([(one, f"shop/{one.name}") for one in spots])
        with StrictClients(fleet.addresses, new=2, kept=4) as clients:
            clients.more(50)
            fleet.deploy("v2", "--yes")
            clients.forget()
            clients.heard(*(f"{one.name} v2" for one in spots))
            assert clients.versions() == {"v2"}
            fleet.deploy("rollback")
            clients.forget()
            clients.heard(*(f"{one.name} v1" for one in spots))
            assert clients.versions() == {"v1"}
        clients.assert_none_failed()
        said = [line.split() for line in fleet.deploy("history").splitlines()[1:3]]
        assert [(line[2], line[3], line[-1]) for line in said] == [
            ("rollback", "v1", "committed"),
            ("deploy", "v2", "committed"),
        ]


RESTART = """#!/bin/sh
# As after a change of the machine itself: the service ends, and is started.
set -eu
handoff stop --name shop
setsid -f handoff run main:app --name shop --chdir {root}/current --bind {address}:{port} </dev/null >{root}/log 2>&1
"""


def test_with_drain_a_host_may_be_off_and_no_request_fails(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        spots = [fleet.spot(f"web{number}") for number in (1, 2)]
        fleet.balancer("lb1", {"main": spots})
        for one in spots:
            script = one.directory / "restart"
            script.write_text(RESTART.format(root=one.directory, address=one.machine.address, port=PORT))
            script.chmod(0o755)
        fleet.start()
        fleet.write(
            [(one, f"shop/{one.name}") for one in spots],
            balancers=["ssh://lb1?name=edge"],
            drain=True,
            reload="{root}/restart",
            once="echo {host} {version} $(basename $(readlink {root}/current)) >>" + str(tmp_path / "once"),
            before="echo before {version} >>" + str(tmp_path / "hooks"),
            after="echo after {version} $HANDOFF_VERDICT >>" + str(tmp_path / "hooks"),
        )
        with StrictClients(fleet.addresses, new=2, short=3) as clients:
            clients.more(50)
            fleet.deploy("v2", "--yes")
            clients.forget()
            clients.heard(*(f"{one.name} v2" for one in spots))
        clients.assert_none_failed()
        assert clients.versions() == {"v2"}
        assert (tmp_path / "once").read_text() == "web1 v2 v1\n"
        assert (tmp_path / "hooks").read_text() == "before v2\nafter v2 committed\n"


JOBS = """
import os
from pathlib import Path

def app(worker: "Worker") -> None:
    if not worker.ready():
        return
    while not worker.wait(0.02):
        for job in sorted(Path("@ROOT@/jobs").iterdir()):
            if not worker.draining and not job.suffix:
                taken = job.rename(job.with_suffix(".taken"))
                worker.wait(0.05)
                with open(Path("@ROOT@/done") / job.name, "x") as done:  # twice would be an error
                    done.write("@VERSION@")
                taken.unlink()
"""


class Work:
    """Jobs for these hosts, from a thread of its own, until it is left: each must be done once."""

    def __init__(self, spots: list[Spot]) -> None:
        self._spots = spots
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._hand_out)
        self.count = 0

    def __enter__(self) -> Work:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _hand_out(self) -> None:
        while not self._ends.wait(0.1):
            self.count += 1
            for one in self._spots:
                (one.directory / "jobs" / f"{self.count:04}").touch()

    def done(self, spot: Spot) -> Counter[str]:
        """How many, by version."""
        return Counter(one.read_text() for one in (spot.directory / "done").iterdir())


def test_job_workers_take_part_without_a_balancer(tmp_path: Path) -> None:
    """And without one the first host keeps the journal and the lock."""
    with Fleet(tmp_path) as fleet:
        spots = [fleet.spot(f"job{number}", port=0, app=JOBS) for number in (1, 2)]
        for one in spots:
            (one.directory / "jobs").mkdir()
            (one.directory / "done").mkdir()
        fleet.start()
        fleet.write([(one, None) for one in spots], batch=2, max_unavailable=2)
        with Work(spots) as work:
            wait_until(lambda: all(work.done(one)["v1"] for one in spots), "the old version works")
            fleet.deploy("v2", "--yes")
            wait_until(lambda: all(work.done(one)["v2"] for one in spots), "the new version works")
        for one in spots:
            wait_until(lambda one=one: work.done(one).total() == work.count, "all jobs are done")
            assert not list((one.directory / "jobs").iterdir())
        assert "committed" in fleet.deploy("status")
        assert list((fleet.directory_of(spots[0].machine) / "state").rglob("rollouts.db"))
