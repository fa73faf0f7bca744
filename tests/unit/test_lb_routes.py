"""Pools that routes lead to, in the controller: in use whatever is active, shown, and taken in place."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from lb.cli.show import _heading, _share
from lb.core.admin import PoolStatus, ServiceStatus, Status
from lb.core.model import HelloRoute
from lb.core.overrides import Overrides, ServiceOverride, Shares
from lb.core.standing import Health
from lb.core.table import Closing
from tests.unit.lb_harness import backend, controller, endpoints, relay, run
from tests.unit.test_lb_commands import command, is_up, status_of
from tests.unit.test_lb_compose import endpoint, observed, service, table
from tests.unit.test_lb_control import config
from tests.unit.test_lb_observed import Hosts, ask

ROUTES = (HelloRoute(sni=("api.example",), pool="blue"),)
ROUTE = '\n[[service.route]]\nsni = "api.example"\npool = "blue"\n'


def test_a_pool_that_a_route_leads_to_is_as_good_as_active() -> None:
    """Its backends are checked, awaited, and panic; what was switched away from it does not close."""
    away = Overrides(
        services={
            "shop": ServiceOverride(
                revision=2, configured="blue", shares=Shares(shares={"green": 100}, at=0.0), closing={"blue": 1050.0}
            )
        }
    )
    one = service(panic_percent=50, routes=ROUTES, tls="require")
    down = dict.fromkeys(("b1", "b2", "b3"), Health.DOWN)
    made = table(one, observed(**down), away)
    assert [each.is_eligible for each in made.routes["shop"].pools["blue"]] == [True] * 4
    assert [each.closing for each in made.routes["shop"].pools["blue"]] == [None] * 4
    assert (made.routes["shop"].hello_routes, made.routes["shop"].tls) == (ROUTES, "require")
    assert made.routes["shop"].shares == {"green": 100}
    assert endpoint(table(one, observed(b1=Health.UNKNOWN), away), "b1").is_awaited
    without = table(msgspec.structs.replace(one, routes=()), observed(), away)
    assert endpoint(without, "b1").closing == Closing(at=50.0, spread_seconds=5.0)


def test_a_switch_that_drains_the_old_pool_leaves_one_that_a_route_leads_to(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            backend() as port,
            controller(config(port, green=(port,)) + ROUTE, tmp_path) as running,
            relay(running.directory) as one,
        ):
            await one.table(is_up)
            fields = {"service": "shop", "pool": "green", "drain_old": True, "deadline_seconds": 60.0}
            _, answer = await command(running, "switch", **fields)
            assert (answer["exit_code"], answer["notes"]) == (0, ["blue is not drained: a route leads to it"])
            made = one.tables[-1]
            assert (made.routes["shop"].shares, made.routes["shop"].hello_routes) == ({"green": 100}, ROUTES)
            assert [each.closing for each in endpoints(made).values()] == [None, None]
            found = (await status_of(running))["services"]["shop"]
            assert [(name, pool["percent"], pool["is_routed"]) for name, pool in found["pools"].items()] == [
                ("blue", 0, True),
                ("green", 100, False),
            ]
            assert found["routes"] == [{"sni": ["api.example"], "alpn": [], "pool": "blue"}]

    run(test)


def test_apply_takes_changed_routes_and_a_wrong_one_changes_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            backend() as port,
            controller(config(port, green=(port,)) + ROUTE, tmp_path) as running,
            relay(running.directory) as one,
        ):
            await one.table(is_up)
            before = endpoints(one.tables[-1])
            wanted = config(port, green=(port,)) + ROUTE.replace("blue", "green").replace("api", "*")
            _, answer = await command(running, "apply", text=wanted, shown="lb.toml")
            assert (answer["exit_code"], answer["notes"]) == (0, [])
            assert one.tables[-1].routes["shop"].hello_routes == (HelloRoute(sni=("*.example",), pool="green"),)
            assert endpoints(one.tables[-1]) == before
            revision = (await status_of(running))["revision"]
            _, answer = await command(running, "apply", text=wanted.replace('"*.', '"*'), shown="lb.toml")
            assert answer["exit_code"] == 2
            assert answer["message"].startswith('lb.toml: line 16: sni: "*example": expected names')
            assert (await status_of(running))["revision"] == revision

    run(test)


def test_it_is_not_ready_while_a_route_leads_to_names_without_an_address(tmp_path: Path) -> None:
    async def test() -> None:
        hosts = Hosts()
        async with backend() as port:
            backends = {"blue": f"app:{port}", "green": f"127.0.0.1:{port}"}
            text = '[balancer]\nresolve_interval = "20ms"\n[[service]]\nname = "shop"\nlisten = "127.0.0.1:1"\n'
            text += 'active = "green"\n'
            text += "".join(f'[service.pool.{pool}]\nbackends = ["{one}"]\n' for pool, one in backends.items())
            async with (
                controller(text + ROUTE, tmp_path, resolver=hosts) as running,
                relay(running.directory) as one,
            ):
                await one.table(lambda made: not endpoints(made)[f"blue/app:{port}"].is_awaited)
                status, said = await ask(running, "/readyz")
                assert (status, said) == (503, f"service shop: no address is known of app:{port}\n")
                hosts.known["app"] = ["127.0.0.1"]
                await one.table(is_up)
                assert (await ask(running, "/readyz"))[0] == 200

    run(test)


@pytest.mark.parametrize(
    ("pool", "shown"),
    [
        (PoolStatus(percent=0, backends={}), "0"),
        (PoolStatus(percent=0, backends={}, is_routed=True), "routes"),
        (PoolStatus(percent=90, backends={}, is_routed=True), "90 + routes"),
    ],
)
def test_status_shows_that_a_pool_gets_connections_by_routes(pool: PoolStatus, shown: str) -> None:
    assert _share(pool) == shown


def test_status_shows_the_routes_in_their_order() -> None:
    routes = (
        HelloRoute(sni=("api.example", "*.api.example"), alpn=("h2",), pool="api"),
        HelloRoute(alpn=("acme-tls/1",), pool="acme"),
    )
    shop = ServiceStatus(listen=(":443",), algorithm="maglev", revision=1, pools={}, tls="require", routes=routes)
    found = Status(name="edge", generation=1, revision=1, is_durable=True, services={"shop": shop}, relays=())
    assert list(_heading(found))[1:] == [
        "service shop: :443, maglev, revision 1, tls require",
        "  sni api.example, *.api.example and alpn h2 -> api",
        "  alpn acme-tls/1 -> acme",
    ]


def test_a_controller_of_an_older_release_has_no_routes_to_show() -> None:
    old = {"listen": (":443",), "algorithm": "maglev", "revision": 1, "pools": {"a": {"percent": 1, "backends": {}}}}
    found = msgspec.convert(old, ServiceStatus)
    assert (found.routes, found.tls, found.pools["a"].is_routed) == ((), "accept", False)
