"""What goes wrong in a rollout over several hosts: it turns back, or stops with a clear word, and no client notices."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.fleet import CHECK, Fleet, Spot
from tests.system.strict import StrictClients

pytestmark = pytest.mark.timeout(300)
SLOW_CHECK = CHECK.replace('interval = "200ms"', 'interval = "1s"').replace("fall = 2", "fall = 3")
"""What was seen before the change is taken back only long after it."""


def rolling(fleet: Fleet, count: int = 2, check: str = CHECK) -> list[Spot]:
    spots = [fleet.spot(f"web{number}") for number in range(1, count + 1)]
    fleet.balancer("lb1", {"main": spots}, check)
    fleet.start()
    return spots


def with_servers(spots: list[Spot]) -> list[tuple[Spot, str | None]]:
    return [(one, f"shop/{one.name}") for one in spots]


def test_a_stage_that_fails_on_the_third_host_leads_the_first_two_back(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        spots = rolling(fleet, 3)
        spots[2].fill_disk()
        fleet.write(with_servers(spots))
        with StrictClients(fleet.addresses, new=2, kept=3) as clients:
            said = fleet.deploy("v2", "--yes", exit_code=3)
            assert "web3: stage exited with status 1" in said
            assert "  web3 | no space left" in said
            clients.forget()
            clients.heard(*(f"{one.name} v1" for one in spots))
            assert clients.versions() == {"v1"}
        clients.assert_none_failed()
        assert [one.current for one in spots] == ["v1", "v1", "v1"]
        assert [one.service.status()["generations"][-1]["generation"] for one in spots] == [3, 3, 1]


def test_a_host_that_cannot_be_reached_leads_the_others_back(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        spots = rolling(fleet)
        fleet.stop_sshd(spots[1].machine)
        fleet.write(with_servers(spots), current=None)
        with StrictClients(fleet.addresses, new=2, kept=2) as clients:
            said = fleet.deploy("v2", "--yes", exit_code=8)
            assert "web2: cannot be reached: " in said
            assert "web1: keeps v2: no previous version is known" in said
            fleet.start_sshd(spots[1].machine)
            hold = spots[1].hold()
            deployer = fleet.begin("v3", "--yes")
            hold.has_come()
            fleet.stop_sshd(spots[1].machine)  # in the middle of a command, which goes on
            fleet.start_sshd(spots[1].machine)
            hold.release()
            deployer.ends(0)
            assert spots[1].staged == ["v1", "v3"]
            fleet.stop_sshd(spots[1].machine)
            said = fleet.deploy("v4", "--yes", exit_code=3)
            assert "web2: cannot be reached: " in said
            clients.forget()
            clients.heard("web1 v3", "web2 v3")
            assert clients.versions() == {"v3"}
        clients.assert_none_failed()


def test_a_version_that_never_passes_its_check_is_taken_back(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        spots = rolling(fleet, check=SLOW_CHECK)
        with StrictClients(fleet.addresses, new=3, short=2) as clients:
            for drain in (False, True):
                clients.forget()
                fleet.write(with_servers(spots), drain=drain, check_timeout="10s", bake="0s")
                said = fleet.deploy("sick-v2", "--yes", exit_code=3)
                assert "shop/main/web1 has passed no check since (down: status 500)" in said
                if drain:
                    assert clients.versions() == {"v1"}, "it never got a connection"
                clients.forget()
                clients.heard("web1 v1", "web2 v1")
                assert clients.versions() == {"v1"}
        clients.assert_none_failed()
        assert [one.current for one in spots] == ["v1", "v1"]


def test_a_pool_that_never_passes_its_check_gets_no_connection(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        pools = {pool: [fleet.spot(f"{pool}1")] for pool in ("blue", "green")}
        fleet.balancer("lb1", pools, SLOW_CHECK)
        fleet.start()
        hosts = [(spot, f"shop/{pool}/{spot.name}") for pool, spots in pools.items() for spot in spots]
        fleet.write(hosts, strategy="blue-green", check_timeout="10s", bake="0s", discard="touch {root}/discarded")
        with StrictClients(fleet.addresses, new=3, kept=2) as clients:
            fleet.deploy("sick-v2", "--yes", exit_code=3)
            clients.more(20)
        clients.assert_none_failed()
        assert clients.versions() == {"v1"}
        assert (pools["green"][0].directory / "discarded").exists()


def test_a_host_of_the_idle_pool_that_is_gone_without_a_word_ends_the_rollout_before_the_switch(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        pools = {"blue": [fleet.spot("blue1")], "green": [fleet.spot("green1"), fleet.spot("green2")]}
        fleet.balancer("lb1", pools)
        fleet.start()
        hosts = [(spot, f"shop/{pool}/{spot.name}") for pool, spots in pools.items() for spot in spots]
        fleet.write(hosts, strategy="blue-green", discard="touch {root}/discarded")
        with StrictClients(fleet.addresses, new=2, kept=2) as clients:
            hold = pools["green"][1].hold()
            deployer = fleet.begin("v2", "--yes")
            hold.has_come()
            fleet.machines["green2"].cut()
            hold.release()
            said = deployer.ends(3)
            assert "green2: " in said
            assert "switch" not in said
            clients.more(20)
        clients.assert_none_failed()
        assert clients.versions() == {"v1"}
