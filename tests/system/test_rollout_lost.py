"""Deployers and stores that are lost in the middle of a rollout: any machine goes on, and traffic all the time."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.system.etcd import Cluster, Node
from tests.system.fleet import Fleet, Spot
from tests.system.harness import wait_until
from tests.system.strict import StrictClients

pytestmark = pytest.mark.timeout(300)
LOCK = {"lock_timeout": "8s"}
"""Long enough for a busy machine, short enough to be waited for."""


def web(fleet: Fleet, count: int, balancers: int = 1) -> list[Spot]:
    spots = [fleet.spot(f"web{number}") for number in range(1, count + 1)]
    for number in range(1, balancers + 1):
        fleet.balancer(f"lb{number}", {"main": spots})
    return spots


def servers(spots: list[Spot]) -> list[tuple[Spot, str | None]]:
    return [(one, f"shop/{one.name}") for one in spots]


def test_another_machine_goes_on_behind_a_deployer_that_was_stopped_or_killed(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        spots = web(fleet, 2)
        fleet.machine("laptop")
        fleet.start()
        for desk in ("desk", "laptop"):
            fleet.write(servers(spots), desk=desk, **LOCK)
        with StrictClients(fleet.addresses, new=2, kept=3) as clients:
            hold = spots[1].hold()
            deployer = fleet.begin("v2", "--yes")
            hold.has_come()
            said = fleet.deploy("v3", "--yes", exit_code=6, desk="laptop")
            assert f"(pid {deployer.process.pid}) since " in said
            deployer.process.send_signal(signal.SIGINT)
            hold.release()
            assert "is paused: by SIGINT; go on with handoff deploy resume" in deployer.ends(7)
            fleet.deploy("resume", desk="laptop")  # at once: it has given the lock back
            clients.forget()
            clients.heard("web1 v2", "web2 v2")
            assert clients.versions() == {"v2"}

            hold = spots[1].hold()
            deployer = fleet.begin("v3", "--yes")
            hold.has_come()
            deployer.process.send_signal(signal.SIGKILL)
            deployer.ends(-signal.SIGKILL)
            assert "next: web2: stage" in fleet.deploy("status", desk="laptop")
            hold.release()
            fleet.resume(desk="laptop")
            clients.forget()
            clients.heard("web1 v3", "web2 v3")
            assert clients.versions() == {"v3"}
        clients.assert_none_failed()
        assert [one.staged for one in spots] == [["v1", "v2", "v3"]] * 2, "nothing was done twice"


def test_others_have_it_paused_and_lead_it_back(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        spots = web(fleet, 2)
        fleet.machine("laptop")
        fleet.start()
        for desk in ("desk", "laptop"):
            fleet.write(servers(spots), desk=desk)
        with StrictClients(fleet.addresses, new=2, kept=2) as clients:
            hold = spots[1].hold()
            deployer = fleet.begin("v2", "--yes")
            hold.has_come()
            fleet.deploy("pause", desk="laptop")
            hold.release()
            assert "is paused: by " in deployer.ends(7)
            assert "is not finished; handoff deploy resume, or abort" in fleet.deploy("v3", "--yes", exit_code=9)
            assert "aborted by" in fleet.deploy("abort", desk="laptop", exit_code=7)
            clients.forget()
            clients.heard("web1 v1", "web2 v1")
            assert clients.versions() == {"v1"}
        clients.assert_none_failed()


def test_the_balancer_that_keeps_the_store_dies_and_the_run_goes_on_when_it_is_back(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        spots = web(fleet, 2, balancers=2)
        fleet.start()
        fleet.write(servers(spots), **LOCK)
        with StrictClients(fleet.addresses[1:], new=2, kept=2) as clients:
            hold = spots[1].hold()
            deployer = fleet.begin("v2", "--yes")
            hold.has_come()
            fleet.kill_balancer("lb1")
            hold.release()
            said = deployer.ends(1)
            assert f"store balancer {fleet.admin('lb1')}" in said
            assert "connection refused" in said
            clients.more(20)
            fleet.start_again("lb1")
            fleet.resume()
            clients.forget()
            clients.heard("web1 v2", "web2 v2")
            assert clients.versions() == {"v2"}
        clients.assert_none_failed()
        assert [one.staged for one in spots] == [["v1", "v2"]] * 2


def test_etcd_loses_its_leader_and_the_run_goes_on_and_most_of_its_nodes_and_it_stops(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        spots = web(fleet, 2)
        machines = [fleet.machine(f"etcd{number}") for number in (1, 2, 3)]
        nodes = [Node(tmp_path, one.name, host=one.address, place=(*one.command,)) for one in machines]
        etcd = Cluster(nodes)
        try:
            etcd.start()
            fleet.start()
            wait_until(lambda: all(one.accepts() for one in nodes), "etcd accepts")
            first = etcd.leader()
            fleet.write(servers(spots), store=etcd.url, **LOCK)
            with StrictClients(fleet.addresses, new=2, kept=2) as clients:
                hold = spots[1].hold()
                deployer = fleet.begin("v2", "--yes")
                hold.has_come()
                first.kill()
                hold.release()
                deployer.ends(0)
                hold = spots[1].hold()
                deployer = fleet.begin("v3", "--yes")
                hold.has_come()
                etcd.leader().kill()
                hold.release()
                assert "store etcd " in deployer.ends(1)
                clients.more(20)
                etcd.start(first)
                fleet.resume()
                clients.forget()
                clients.heard("web1 v3", "web2 v3")
                assert clients.versions() == {"v3"}
            clients.assert_none_failed()
            assert [one.staged for one in spots] == [["v1", "v2", "v3"]] * 2
        finally:
            etcd.kill()
