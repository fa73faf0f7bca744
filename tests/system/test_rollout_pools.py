"""Blue/green and canary rollouts: two fleets, two ports of the same machines, gates; under strict clients."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.slow_link import SlowLink
from tests.system.fleet import Fleet, Spot
from tests.system.harness import wait_until
from tests.system.strict import StrictClients

pytestmark = pytest.mark.timeout(300)
RETIRE = {"retire": "touch {root}/retired", "discard": "touch {root}/discarded", "keep": "200ms"}


def hosts(pools: dict[str, list[Spot]]) -> list[tuple[Spot, str | None]]:
    return [(spot, f"shop/{pool}/{spot.name}") for pool, spots in pools.items() for spot in spots]


def marked(mark: str, pools: dict[str, list[Spot]]) -> set[str]:
    """The hosts that a command was run on."""
    return {spot.name for spots in pools.values() for spot in spots if (spot.directory / mark).exists()}


def test_blue_green_on_two_fleets_both_ways_and_one_switch_back(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        pools = {pool: [fleet.spot(f"{pool}{number}") for number in (1, 2)] for pool in ("blue", "green")}
        for name in ("lb1", "lb2"):
            fleet.balancer(name, pools)
        fleet.start()
        fleet.write(hosts(pools), strategy="blue-green")
        with StrictClients(fleet.addresses, new=4, kept=2) as clients:
            clients.heard("blue1 v1", "blue2 v1")
            with StrictClients(fleet.addresses, new=4) as others:
                fleet.deploy("v2", "--yes")
                others.forget()
                others.heard("green1 v2", "green2 v2")
                assert others.versions() == {"v2"}, "all new connections go to the new pool"
                fleet.deploy("v3", "--yes")
                others.forget()
                others.heard("blue1 v3", "blue2 v3")
                assert others.versions() == {"v3"}
                fleet.deploy("rollback")
                others.forget()
                others.heard("green1 v2", "green2 v2")
                assert others.versions() == {"v2"}, "the old pool is warm, with its version"
            others.assert_none_failed()
        clients.assert_none_failed()
        assert {clients.last[number] for number in clients.last} <= {"blue1 v3", "blue2 v3"}, "they stay where they are"
        assert [one.current for one in pools["green"]] == ["v2", "v2"]


def test_blue_green_on_two_ports_of_the_same_machines(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        machines = [fleet.machine(f"web{number}") for number in (1, 2)]
        pools = {
            pool: [fleet.spot(f"{one.name}-{pool}", one, pool, port) for one in machines]
            for pool, port in (("blue", 8001), ("green", 8002))
        }
        fleet.balancer("lb1", pools)
        fleet.start()
        fleet.write(hosts(pools), strategy="blue-green", **RETIRE)
        with StrictClients(fleet.addresses, new=3, kept=2) as clients:
            clients.heard("web1-blue v1", "web2-blue v1")
            fleet.deploy("v2", "--yes")
            clients.heard("web1-green v2", "web2-green v2")
        clients.assert_none_failed()
        assert marked("retired", pools) == {"web1-blue", "web2-blue"}
        assert not marked("discarded", pools)


ASKS = f"""#!{sys.executable}
# A gate of one's own: does each new host answer as it should, and in time?
import os, sys, time, urllib.request

addresses = dict(one.split("=") for one in sys.argv[1:])
for host in os.environ["HANDOFF_HOSTS"].split():
    began = time.monotonic()
    with urllib.request.urlopen(addresses[host], timeout=60) as answer:
        assert answer.read().decode() == f"{{host}} {{os.environ['HANDOFF_VERSION']}}"
    assert time.monotonic() - began < 4, "too slow"
"""


def test_a_canary_passes_its_gates_and_a_slow_one_does_not(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        pools = {pool: [fleet.spot(f"{pool}1")] for pool in ("blue", "green")}
        fleet.balancer("lb1", pools)
        fleet.start()
        gate = tmp_path / "gate"
        gate.write_text(ASKS)
        gate.chmod(0o755)
        places = [f"{one.name}=http://{one.machine.address}:{one.port}/" for spots in pools.values() for one in spots]
        (address, port) = fleet.addresses[0]
        fleet.write(
            hosts(pools),
            strategy="canary",
            steps=[20, 60],
            bake="1s",
            gate={
                "failed_percent": 0,
                "reset_percent": 0,
                "connect_ratio": 1000,
                "minimum_connections": 5,
                "command": " ".join([str(gate), *places]),
                "probe": f"http://{address}:{port}/health",
            },
            **RETIRE,
        )
        with StrictClients(fleet.addresses, new=4, kept=2) as clients:
            said = fleet.deploy("v2", "--yes")
            assert [line for line in said.splitlines() if "switch to" in line] == [
                f"green: switch to {percent} %" for percent in (20, 60, 100)
            ]
            assert clients.versions() == {"v1", "v2"}
            assert (marked("retired", pools), marked("discarded", pools)) == ({"blue1"}, set())
            clients.forget()
            said = fleet.deploy("slow-v3", "--yes", exit_code=3)
            assert "the gate's command exited with status 1" in said
            assert "switch to 60 %" not in said
            assert marked("discarded", pools) == {"blue1"}
            clients.forget()
            clients.heard("green1 v2")
        clients.assert_none_failed()
        balancer = fleet.balancers["lb1"].lb_status()["services"]["shop"]["pools"]
        assert {name: one["percent"] for name, one in balancer.items()} == {"blue": 0, "green": 100}


def test_a_pool_that_is_slow_to_connect_to_does_not_pass(tmp_path: Path) -> None:
    with SlowLink(0.1) as link, Fleet(tmp_path) as fleet:
        blue, green = fleet.spot("blue1"), fleet.spot("green1", fleet.machine("green1", link.namespaces["server"]))
        pools = {"blue": [blue], "green": [green]}
        places = {"green1": link.ipv4["server"]}
        fleet.balancer("lb1", pools, machine=fleet.machine("lb1", link.namespaces["client"]), addresses=places)
        fleet.start()
        gate = {"connect_ratio": 10, "minimum_connections": 5}
        fleet.write(hosts(pools), strategy="canary", steps=[50], bake="2s", gate=gate, **RETIRE)
        with StrictClients(fleet.addresses, new=4, kept=2) as clients:
            said = fleet.deploy("v2", "--yes", exit_code=3)
            assert "connecting to the new backends takes " in said
            assert "switch to 100 %" not in said
            said = fleet.deploy("v3", "--yes", "--strategy", "blue-green", exit_code=3)
            assert "connecting to the new backends takes " in said
            clients.forget()
            clients.heard("blue1 v1")
        clients.assert_none_failed()
        assert marked("discarded", pools) == {"green1"}


def test_the_way_back_leads_to_an_old_pool_that_is_not_whole(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        pools = {"blue": [fleet.spot("blue1"), fleet.spot("blue2")], "green": [fleet.spot("green1")]}
        fleet.balancer("lb1", pools)
        fleet.start()
        fleet.write(hosts(pools), strategy="blue-green", gate={"command": f"{fleet.gate_command}; false"})
        with StrictClients(fleet.addresses, new=3) as clients:
            hold = fleet.gate()
            deployer = fleet.begin("v2", "--yes")
            hold.has_come()
            pools["blue"][1].service.handoff("stop")
            down = ("blue/blue2", "down")
            states = fleet.balancers["lb1"].backends
            wait_until(lambda: down in [(name, one["health"]) for name, one in states().items()], "blue2 is down")
            hold.release()
            deployer.ends(3)
            clients.forget()
            clients.heard("blue1 v1")
            assert clients.versions() == {"v1"}
        clients.assert_none_failed()


def test_a_balancer_that_is_cut_off_in_the_middle_of_a_switch_and_comes_back_or_is_left_out(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        pools = {pool: [fleet.spot(f"{pool}1")] for pool in ("blue", "green")}
        for name in ("lb1", "lb2"):
            fleet.balancer(name, pools)
        fleet.start()
        fleet.write(hosts(pools), strategy="canary", steps=[50], gate={"command": fleet.gate_command}, **RETIRE)
        with StrictClients(fleet.addresses[:1], new=3, kept=2) as clients:
            cut_off_in_the_middle(fleet, "v2")
            clients.forget()
            clients.heard("blue1 v1")
            assert clients.versions() == {"v1"}, "the other one was switched back"
            fleet.machines["lb2"].mend()
            fleet.deploy("resume", exit_code=3)
            with StrictClients(fleet.addresses[1:], new=3) as others:
                others.more(20)
            assert others.versions() == {"v1"}
            others.assert_none_failed()

            cut_off_in_the_middle(fleet, "v3")
            fleet.deploy("resume", "--without-balancer", fleet.admin("lb2"), exit_code=3)
            assert f"without {fleet.admin('lb2')} (by " in fleet.deploy("status")
            clients.forget()
            clients.heard("blue1 v1")
            assert clients.versions() == {"v1"}
        clients.assert_none_failed()


def cut_off_in_the_middle(fleet: Fleet, version: str) -> None:
    """The second balancer, between two steps of the canary; the verdict is partial."""
    hold = fleet.gate()
    deployer = fleet.begin(version, "--yes")
    hold.has_come()
    fleet.machines["lb2"].cut()
    hold.release()
    assert f"failed: {fleet.admin('lb2')}: balancer {fleet.admin('lb2')}: no " in deployer.ends(8)
