"""The table, from all combinations of what people want and what was observed."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from lb.core.compose import Leaving, Observed, Record, compose, recorded
from lb.core.model import Backend, Balancer, Check, Service, Timeouts
from lb.core.overrides import Overrides, ServiceOverride, Shares, StateChange, WeightChange
from lb.core.standing import Administrative, CheckedHealth, Health, Standing
from lb.core.table import Closing, Endpoint, Table

NAMES = ("b1", "b2", "b3", "b4")


def service(**fields: object) -> Service:
    backends = tuple(Backend(name=name, address=f"10.0.0.{name[1]}:80") for name in NAMES)
    base = Service(name="shop", listen=(":80",), pools={"blue": backends, "green": ()}, active="blue", check=Check())
    return msgspec.structs.replace(base, **fields)


def identity(name: str) -> str:
    return f"shop/blue/{name}@10.0.0.{name[1]}:80#1"


def observed(ejected: tuple[str, ...] = (), **health: Health) -> Observed:
    """All others are up."""
    records = {
        identity(name): Record(checked=CheckedHealth(health.get(name, Health.UP)), up_since=5.0) for name in NAMES
    }
    return Observed(records=records, ejected=frozenset(identity(name) for name in ejected))


def table(one: Service, seen: Observed, overrides: Overrides | None = None) -> Table:
    balancer = Balancer(name="edge", services=(one,))
    return compose(balancer, overrides or Overrides(), seen, generation=3, revision=7, wall_offset=1000.0)


def endpoint(made: Table, name: str) -> Endpoint:
    return next(one for one in made.routes["shop"].pools["blue"] if one.name == name)


def state(wanted: Administrative, closing_at: float | None = None) -> StateChange:
    assert wanted is not Administrative.READY
    text = "drain" if wanted is Administrative.DRAIN else "maint"
    return StateChange(state=text, at=1010.0, closing_at=closing_at)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wanted", "health", "is_ejected"), list(itertools.product(Administrative, Health, [False, True]))
)
def test_all_combinations(wanted: Administrative, health: Health, is_ejected: bool) -> None:
    overrides = Overrides()
    if wanted is not Administrative.READY:
        overrides = Overrides(states={"shop/blue/b1": state(wanted)})
    made = table(service(), observed(("b1",) if is_ejected else (), b1=health), overrides)
    one, is_ready = endpoint(made, "b1"), wanted is Administrative.READY
    assert one.is_eligible == (is_ready and health is Health.UP and not is_ejected)
    assert one.is_awaited == (is_ready and health is Health.UNKNOWN and not is_ejected)
    assert one.closing == (Closing(at=10.0) if wanted is Administrative.MAINT else None)
    assert all(endpoint(made, name).is_eligible for name in NAMES[1:])
    assert (made.generation, made.revision) == (3, 7)


def test_who_has_no_checks_is_up_and_who_was_never_checked_is_awaited() -> None:
    assert all(one.is_eligible for one in table(service(check=None), Observed()).routes["shop"].pools["blue"])
    assert all(one.is_awaited for one in table(service(), Observed()).routes["shop"].pools["blue"])


@pytest.mark.parametrize(
    ("down", "percent", "eligible"),
    [
        ((), 50, "b1 b2 b3 b4"),
        (("b1", "b2"), 50, "b3 b4"),
        (("b1", "b2", "b3"), 50, "b1 b2 b3 b4"),
        (("b1", "b2", "b3"), 0, "b4"),
        (NAMES, 0, ""),
        (NAMES, 1, "b1 b2 b3 b4"),
    ],
)
def test_panic_is_when_fewer_are_up_than_that(down: tuple[str, ...], percent: int, eligible: str) -> None:
    made = table(service(panic_percent=percent), observed(**dict.fromkeys(down, Health.DOWN)))
    assert " ".join(name for name in NAMES if endpoint(made, name).is_eligible) == eligible


def test_panic_lifts_ejections_too_but_no_drain() -> None:
    overrides = Overrides(states={"shop/blue/b1": state(Administrative.DRAIN)})
    made = table(service(panic_percent=50), observed(("b2", "b3"), b4=Health.DOWN), overrides)
    assert [name for name in NAMES if endpoint(made, name).is_eligible] == ["b2", "b3", "b4"]


def test_no_panic_while_some_were_never_checked_or_a_backup_is_up() -> None:
    some = table(service(panic_percent=90), observed(b1=Health.DOWN, b2=Health.UNKNOWN, b3=Health.DOWN))
    assert [name for name in NAMES if endpoint(some, name).is_eligible] == ["b4"]
    backends = service().pools["blue"]
    with_backup = (*backends[:3], msgspec.structs.replace(backends[3], backup=True))
    made = table(
        service(panic_percent=90, pools={"blue": with_backup}),
        observed(b1=Health.DOWN, b2=Health.DOWN, b3=Health.DOWN),
    )
    assert [name for name in NAMES if endpoint(made, name).is_eligible] == ["b4"]


def test_slow_start_counts_only_where_it_is_configured() -> None:
    assert endpoint(table(service(), observed()), "b1").up_since is None
    assert endpoint(table(service(slow_start_seconds=3.0), observed()), "b1").up_since == 5.0


def test_weights_shares_and_deadlines_are_as_people_changed_them() -> None:
    overrides = Overrides(
        states={"shop/blue/b2": state(Administrative.DRAIN, closing_at=1030.0)},
        weights={"shop/blue/b1": WeightChange(at=0.0, weight=0)},
        services={
            "shop": ServiceOverride(
                revision=4,
                configured="blue",
                shares=Shares(shares={"green": 100}, at=0.0),
                closing={"blue": 1050.0},
            )
        },
    )
    made = table(service(timeouts=Timeouts(spread_seconds=2.0)), observed(), overrides)
    assert (endpoint(made, "b1").weight, endpoint(made, "b1").is_eligible) == (0.0, True)
    assert endpoint(made, "b1").closing == Closing(at=50.0, spread_seconds=2.0)
    assert endpoint(made, "b2").closing == Closing(at=30.0, spread_seconds=2.0)
    assert (made.routes["shop"].revision, made.routes["shop"].shares) == (4, {"green": 100})


def test_who_leaves_stays_in_the_table_also_of_a_pool_that_is_gone() -> None:
    left = Endpoint(identity="shop/red/r1@10.0.0.9:80#1", name="r1", address="10.0.0.9:80", is_eligible=False)
    seen = msgspec.structs.replace(
        observed(), leaving={left.identity: Leaving(service="shop", pool="red", endpoint=left)}
    )
    assert table(service(), seen).routes["shop"].pools["red"] == (left,)


def test_a_name_is_the_address_that_it_stands_for() -> None:
    named = service(pools={"blue": (Backend(name="b1", address="db.example:80"),)})
    seen = Observed(addresses={"db.example:80": "10.0.0.1:80"})
    one = endpoint(table(named, seen), "b1")
    assert (one.address, one.identity) == ("10.0.0.1:80", identity("b1"))


def test_a_backend_starts_slowly_when_it_is_new_or_comes_back_but_not_at_the_start_of_all() -> None:
    up, out = Standing(), Standing(is_ejected=True)
    assert recorded(None, up, 1.0, is_start=True).up_since is None
    first = recorded(None, up, 1.0, is_start=False)
    assert first.up_since == 1.0
    assert recorded(first, up, 2.0, is_start=False) == first
    ejected = recorded(first, out, 3.0, is_start=False)
    assert (ejected.up_since, ejected.since) == (1.0, 3.0)
    assert recorded(ejected, up, 4.0, is_start=False).up_since == 4.0


def test_who_was_in_maintenance_comes_back_unknown() -> None:
    record = Record(checked=CheckedHealth(Health.UP), standing=Standing())
    kept = recorded(record, Standing(Administrative.MAINT), 1.0, is_start=False)
    assert kept.checked == CheckedHealth()
