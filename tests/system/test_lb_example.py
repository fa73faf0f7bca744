"""The example of the balancer does what its README says."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.system.balancer import Balancer
from tests.system.harness import Clients, Service

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "balancer"


def test_blue_and_green_on_one_machine(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(EXAMPLE, tmp_path / "balancer"))
    with (
        Service(directory, app="shop:app", name="blue") as blue,
        Service(directory, app="shop:app", name="green") as green,
    ):
        text = (EXAMPLE / "lb.toml").read_text().replace(":8080", ":0")
        text = text.replace(":9001", f":{blue.port}").replace(":9002", f":{green.port}")
        with Balancer(directory, text) as edge, Clients(edge.body) as clients:
            assert edge.body() == "this is blue\n"
            edge.done("switch", "shop", "green", "--wait", "10s")
            assert {edge.body() for _ in range(20)} == {"this is green\n"}
            edge.done("rollback", "shop")
            assert {edge.body() for _ in range(20)} == {"this is blue\n"}
            edge.done("switch", "shop", "green", "--percent", "10")
            pools = edge.lb_status()["services"]["shop"]["pools"]
            assert {name: pool["percent"] for name, pool in pools.items()} == {"blue": 90, "green": 10}
            assert "green1" in edge.done("status")
            edge.done("rollback", "shop")
            edge.write(edge.file.read_text().replace('interval = "1s"', 'interval = "500ms"'))
            applied = edge.lb("apply")
            assert (applied.returncode, applied.stdout) == (0, "edge: lb.toml is applied: shop changed\n")
            assert applied.stderr == ""
        clients.assert_none_failed()


def test_a_switch_to_a_pool_that_is_not_healthy_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(EXAMPLE, tmp_path / "balancer"))
    with Service(directory, app="shop:app", name="blue") as blue:
        text = (EXAMPLE / "lb.toml").read_text().replace(":8080", ":0").replace(":9001", f":{blue.port}")
        with Balancer(directory, text.replace(":9002", ":1")) as edge:  # where nobody listens
            refused = edge.lb("switch", "shop", "green", "--wait", "100ms")
            assert (refused.returncode, refused.stdout) == (9, "")
            assert refused.stderr.startswith("edge: ")
            assert {edge.body() for _ in range(10)} == {"this is blue\n"}
