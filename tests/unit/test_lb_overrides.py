"""Run-time changes: what the file contradicts is dropped and said; identities; switches and their history."""

from __future__ import annotations

import msgspec

from lb.core.model import Backend, Balancer, Service
from lb.core.overrides import (
    MAXIMUM_HISTORY,
    MAXIMUM_INCARNATIONS,
    Added,
    Overrides,
    Removed,
    Shares,
    StateChange,
    WeightChange,
    expired,
    identity_of,
    next_expiry,
    pools_of,
    retired,
    revision_of,
    said_of,
    said_of_weight,
    settled,
    shares_of,
    with_shares,
)

B1, B2, G1 = (Backend(name=name, address=f"10.0.0.{number}:80") for number, name in enumerate(("b1", "b2", "g1"), 1))


def balancer(*blue: Backend, active: str = "blue", green: tuple[Backend, ...] | None = (G1,)) -> Balancer:
    pools = {"blue": blue} if green is None else {"blue": blue, "green": green}
    return Balancer(name="edge", services=(Service(name="shop", listen=(":80",), pools=pools, active=active),))


def drained(backend: Backend, until: float | None = None) -> StateChange:
    return StateChange(who="ann", at=0.0, state="drain", configured=backend.address, until=until)


def weighed(backend: Backend, weight: int) -> WeightChange:
    return WeightChange(who="ann", at=0.0, configured=said_of_weight(backend), weight=weight)


def replaced(backend: Backend, **fields: object) -> Backend:
    return msgspec.structs.replace(backend, **fields)


def test_what_the_file_does_not_contradict_holds_and_settling_again_changes_nothing() -> None:
    overrides = Overrides(states={"shop/blue/b1": drained(B1)}, weights={"shop/blue/b1": weighed(B1, 5)})
    kept, notes = settled(overrides, balancer(B1, B2), 1.0)
    assert notes == ()
    assert (kept.states, kept.weights) == (overrides.states, overrides.weights)
    assert settled(kept, balancer(B1, B2), 2.0) == (kept, ())


def test_an_edited_weight_drops_a_changed_weight_but_no_drain() -> None:
    overrides = Overrides(states={"shop/blue/b1": drained(B1)}, weights={"shop/blue/b1": weighed(B1, 5)})
    kept, notes = settled(overrides, balancer(replaced(B1, weight=3)), 1.0)
    assert kept.weights == {}
    assert kept.states == overrides.states
    assert notes == (
        "shop/blue/b1: weight by ann dropped, the file says 10.0.0.1:80 weight 3 by now, not 10.0.0.1:80 weight 1",
    )


def test_another_address_or_none_drops_a_drain() -> None:
    overrides = Overrides(states={"shop/blue/b1": drained(B1)})
    kept, notes = settled(overrides, balancer(replaced(B1, address="10.0.0.9:80")), 1.0)
    assert kept.states == {}
    assert "says 10.0.0.9:80 by now, not 10.0.0.1:80" in notes[0]
    kept, notes = settled(overrides, balancer(B2), 1.0)
    assert kept.states == {}
    assert "does not have it any more" in notes[0]


def test_an_added_backend_is_there_until_the_file_has_it_or_has_not_its_pool() -> None:
    overrides = Overrides(added={"shop/green/x": Added(at=0.0, backend=replaced(B2, name="x"))})
    kept, notes = settled(overrides, balancer(B1), 1.0)
    assert notes == ()
    assert [one.name for one in pools_of(balancer(B1).services[0], kept)["green"]] == ["g1", "x"]
    dropped, notes = settled(kept, balancer(B1, green=(replaced(G1, name="x"),)), 1.0)
    assert dropped.added == {}
    assert "stands in the file by now" in notes[0]
    dropped, notes = settled(kept, balancer(B1, green=None), 1.0)
    assert dropped.added == {}
    assert "its pool is gone" in notes[0]


def test_a_removed_backend_stays_away_until_the_file_says_another_thing_of_it() -> None:
    overrides = Overrides(removed={"shop/blue/b1": Removed(at=0.0, configured=said_of(B1))})
    kept, notes = settled(overrides, balancer(B1, B2), 1.0)
    assert notes == ()
    assert pools_of(balancer(B1, B2).services[0], kept)["blue"] == (B2,)
    kept, notes = settled(overrides, balancer(replaced(B1, maxconn=9), B2), 1.0)
    assert len(notes) == 1
    assert [one.name for one in pools_of(balancer(replaced(B1, maxconn=9), B2).services[0], kept)["blue"]] == [
        "b1",
        "b2",
    ]


def test_an_added_backend_may_have_the_name_of_one_that_was_removed_from_the_file() -> None:
    other = replaced(B1, address="10.0.0.9:80")
    overrides = Overrides(
        removed={"shop/blue/b1": Removed(at=0.0, configured=said_of(B1))},
        added={"shop/blue/b1": Added(at=0.0, backend=other)},
        states={"shop/blue/b1": drained(other)},
    )
    kept, notes = settled(overrides, balancer(B1), 1.0)
    assert notes == ()
    assert pools_of(balancer(B1).services[0], kept)["blue"] == (other,)


def test_each_switch_is_the_next_revision_and_remembers_the_former_shares() -> None:
    service = balancer(B1).services[0]
    overrides, _ = settled(Overrides(), balancer(B1), 0.0)
    assert (revision_of("shop", overrides), shares_of(service, overrides)) == (1, {"blue": 100})
    overrides = with_shares(overrides, service, Shares(shares={"green": 100}, at=1.0), {"blue": 9.0})
    assert (revision_of("shop", overrides), shares_of(service, overrides)) == (2, {"green": 100})
    assert overrides.services["shop"].closing == {"blue": 9.0}
    overrides = with_shares(overrides, service, Shares(shares={"green": 50, "blue": 50}, at=2.0))
    assert [one.shares for one in overrides.services["shop"].history] == [{"blue": 100}, {"green": 100}]
    assert overrides.services["shop"].closing == {}
    assert with_shares(overrides, service, Shares(shares={"green": 50, "blue": 50}, at=3.0)) == overrides
    for number in range(2 * MAXIMUM_HISTORY):
        shares = Shares(shares={"green": 1 + number, "blue": 99 - number}, at=3.0)
        overrides = with_shares(overrides, service, shares)
    assert len(overrides.services["shop"].history) == MAXIMUM_HISTORY


def test_an_edit_of_the_active_pool_wins_over_a_switch_as_the_next_revision() -> None:
    overrides, _ = settled(Overrides(), balancer(B1), 0.0)
    switched = with_shares(
        overrides, balancer(B1).services[0], Shares(shares={"green": 10, "blue": 90}, who="ann", at=1.0)
    )
    assert settled(switched, balancer(B1, B2), 2.0) == (switched, ())  # another edit does not
    edited = balancer(B1, active="green")
    kept, notes = settled(switched, edited, 2.0)
    assert (revision_of("shop", kept), shares_of(edited.services[0], kept)) == (3, {"green": 100})
    assert notes == ("shop: switch to green 10 %, blue 90 % by ann dropped, the file says active = green by now",)
    gone = balancer(B1, green=None)
    kept, notes = settled(switched, gone, 2.0)
    assert shares_of(gone.services[0], kept) == {"blue": 100}
    assert "does not have such a pool any more" in notes[0]
    assert settled(kept, gone, 3.0) == (kept, ())


def test_who_comes_to_the_same_place_again_is_another_one() -> None:
    first = identity_of(Overrides(), "shop", "blue", "b1", "10.0.0.1:80")
    assert first == "shop/blue/b1@10.0.0.1:80#1"
    overrides = retired(Overrides(), [first])
    assert identity_of(overrides, "shop", "blue", "b1", "10.0.0.1:80") == "shop/blue/b1@10.0.0.1:80#2"
    assert identity_of(overrides, "shop", "blue", "b1", "10.0.0.2:80") == "shop/blue/b1@10.0.0.2:80#1"
    assert retired(overrides, [first]) == overrides
    many = retired(overrides, [f"shop/blue/b@10.0.0.1:{port}#1" for port in range(MAXIMUM_INCARNATIONS)])
    assert len(many.incarnations) == MAXIMUM_INCARNATIONS


def test_a_change_ends_when_its_time_is_over() -> None:
    overrides = Overrides(states={"shop/blue/b1": drained(B1, until=5.0), "shop/blue/b2": drained(B2, until=9.0)})
    assert next_expiry(overrides) == 5.0
    assert expired(overrides, 4.9) == (overrides, ())
    left, notes = expired(overrides, 5.0)
    assert list(left.states) == ["shop/blue/b2"]
    assert notes == ("shop/blue/b1: drain is over",)
    assert next_expiry(Overrides()) is None


def test_it_survives_being_written_down() -> None:
    overrides, _ = settled(
        Overrides(
            states={"shop/blue/b1": drained(B1, until=5.0)},
            weights={"shop/blue/b2": weighed(B2, 0)},
            added={"shop/green/x": Added(at=0.0, backend=replaced(B2, name="x"))},
        ),
        balancer(B1, B2),
        0.0,
    )
    assert msgspec.json.decode(msgspec.json.encode(overrides), type=Overrides) == overrides
