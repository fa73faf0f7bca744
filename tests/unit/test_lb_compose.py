"""The table, from all combinations of what people want and what was observed."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from lb.core.agent import Said, parse
from lb.core.compose import Leaving, Observed, Record, compose, recorded
from lb.core.model import Backend, Balancer, Check, Service, Timeouts
from lb.core.naming import Answer
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


def test_a_name_is_as_many_backends_as_it_has_addresses() -> None:
    named = service(pools={"blue": (Backend(name="b1", address="db.example:80", weight=3),)})
    answer = Answer(addresses=("10.0.0.1:80", "10.0.0.2:80"), at=1.0, error="try again")
    up = Record(checked=CheckedHealth(Health.UP))
    seen = Observed(answers={"db.example:80": answer}, records={identity("b1"): up})
    first, second = table(named, seen).routes["shop"].pools["blue"]
    assert (first.name, first.address, first.identity) == ("b1@10.0.0.1:80", "10.0.0.1:80", identity("b1"))
    assert (second.name, second.identity) == ("b1@10.0.0.2:80", "shop/blue/b1@10.0.0.2:80#1")
    assert (first.is_eligible, second.is_eligible, second.is_awaited) == (True, False, True)
    assert (first.weight, second.weight) == (3.0, 3.0)
    drained = Overrides(states={"shop/blue/b1": state(Administrative.DRAIN)})
    assert [one.is_eligible for one in table(named, seen, drained).routes["shop"].pools["blue"]] == [False, False]


def test_a_name_without_an_answer_is_awaited_until_asking_has_failed_and_never_eligible() -> None:
    backends = (Backend(name="b1", address="db.example:80"), Backend(name="b2", address="10.0.0.2:80"))
    named = service(pools={"blue": backends}, panic_percent=100)
    seen = observed(b2=Health.DOWN)
    one = endpoint(table(named, seen), "b1")
    assert (one.address, one.is_eligible, one.is_awaited) == ("db.example:80", False, True)
    failed = msgspec.structs.replace(seen, answers={"db.example:80": Answer(error="not known")})
    made = table(named, failed)
    assert (endpoint(made, "b1").is_eligible, endpoint(made, "b1").is_awaited) == (False, False)
    assert endpoint(made, "b2").is_eligible, "panic: it does not wait for a name"


def said(line: str) -> Said:
    return parse(line)


@pytest.mark.parametrize("checked", list(Health))
@pytest.mark.parametrize("words", [None, "up", "down", "ready", "50%"])
@pytest.mark.parametrize("kind", ["check", "agent", "both", "neither"])
def test_health_by_checks_and_by_an_agent(kind: str, words: str | None, checked: Health) -> None:
    agent = Check(type="agent", port=9)
    one = service(
        check={"check": Check(), "both": Check(), "agent": agent}.get(kind), agent=agent if kind == "both" else None
    )
    record = Record(checked=CheckedHealth(checked), said=None if words is None else said(words))
    made = endpoint(table(one, Observed(records={identity("b1"): record})), "b1")
    counts = kind in ("agent", "both")
    expected = {"check": checked, "both": checked, "neither": Health.UP}.get(kind)
    if kind == "agent":
        expected = Health.UNKNOWN if words is None else Health.UP
    if counts and words == "down":
        expected = Health.DOWN
    assert made.is_eligible is (expected is Health.UP)
    assert made.is_awaited is (expected is Health.UNKNOWN)
    assert made.weight == (0.5 if counts and words == "50%" else 1.0)


AGENTS = service(agent=Check(type="agent", port=9))


def with_words(words: str, overrides: Overrides | None = None) -> Endpoint:
    record = Record(checked=CheckedHealth(Health.UP), said=said(words))
    return endpoint(table(AGENTS, Observed(records={identity("b1"): record}), overrides), "b1")


@pytest.mark.parametrize("words", ["drain", "maint"])
def test_what_an_agent_wants_sends_nothing_new_and_closes_nothing(words: str) -> None:
    one = with_words(words)
    assert (one.is_eligible, one.is_awaited, one.closing) == (False, False, None)


def test_what_people_want_wins_over_what_the_agent_wants() -> None:
    forced = StateChange(state="ready", at=1.0)
    assert with_words("drain", Overrides(states={"shop/blue/b1": forced})).is_eligible
    drained = Overrides(states={"shop/blue/b1": state(Administrative.DRAIN)})
    assert not with_words("ready up 100%", drained).is_eligible
    heavier = Overrides(weights={"shop/blue/b1": WeightChange(weight=7, at=1.0)})
    assert with_words("10%", heavier).weight == 7.0
    assert not with_words("down", Overrides(states={"shop/blue/b1": forced})).is_eligible


def test_an_agent_sets_weight_and_maxconn() -> None:
    one = with_words("50% maxconn:30")
    assert (one.weight, one.maxconn) == (0.5, 30)
    assert with_words("0%").weight == 0.0
    assert with_words("99999%").weight == 256.0


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
