"""Maglev hashing: even, the same everywhere, and little moves when a backend comes or goes."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lb.core.choice import Candidate
from lb.core.maglev import SLOTS, Maglev, filled

NAMES = st.lists(st.text("abcdefgh", min_size=1, max_size=5), unique=True, min_size=1, max_size=12)
NO = (0.0, 0.0)


def backends(count: int) -> list[Candidate]:
    return [Candidate(f"shop/main/b{number}@10.0.0.{number}:80#{number}") for number in range(count)]


def chosen(algorithm: Maglev, candidates: list[Candidate], source: str) -> str:
    found = algorithm.choose(candidates, source, NO)
    assert found is not None
    return found.identity


@given(NAMES)
@settings(max_examples=30, deadline=None)
def test_backends_of_one_weight_have_one_number_of_slots_or_one_more(names: list[str]) -> None:
    counts = Counter(filled(tuple((name, 1.0) for name in sorted(names))))
    assert set(counts) == set(names)
    assert sum(counts.values()) == SLOTS
    assert max(counts.values()) - min(counts.values()) <= 1


def test_slots_go_by_weight_and_the_lightest_has_one() -> None:
    counts = Counter(filled((("a", 1.0), ("b", 3.0), ("c", 4.0))))
    assert [counts[name] / SLOTS for name in "abc"] == pytest.approx([1 / 8, 3 / 8, 4 / 8], abs=0.01)
    many = (*((f"b{number:03}", 256.0) for number in range(100)), ("light", 1.0))
    assert Counter(filled(many))["light"] >= 1


@given(st.permutations(backends(7)), st.ip_addresses().map(str))
@settings(max_examples=50, deadline=None)
def test_the_same_everywhere(order: list[Candidate], source: str) -> None:
    here = Maglev(backends(7))
    elsewhere = Maglev([one._replace(identity=one.identity[:-1] + "99") for one in order])  # numbered otherwise
    found = chosen(here, order, source)
    assert found.partition("#")[0] == chosen(elsewhere, [*reversed(order)], source).partition("#")[0]


def test_what_is_chosen_does_not_change_between_releases() -> None:
    algorithm = Maglev(backends(5))
    found = [chosen(algorithm, backends(5), f"192.0.2.{number}")[11] for number in range(12)]
    assert "".join(found) == "124203020220"


@pytest.mark.parametrize("count", [3, 10, 50])
def test_when_one_goes_only_its_clients_move_and_a_few_more(count: int) -> None:
    before, after = backends(count), backends(count)
    gone = after.pop(count // 2)
    old, new = Maglev(before), Maglev(after)
    sources = [f"10.{number % 7}.{number // 250}.{number % 250}" for number in range(4000)]
    moved = others = 0
    for source in sources:
        was = chosen(old, before, source)
        if was != chosen(new, after, source):
            moved += 1
            others += was != gone.identity
    assert moved <= len(sources) * (1 / count + 0.1)
    assert others <= len(sources) * 0.1


def test_one_that_is_full_is_passed_over_and_nobody_elses_clients_move() -> None:
    present = backends(6)
    algorithm = Maglev(present)
    full, rest = present[2], present[:2] + present[3:]
    to_others = Counter()
    for number in range(2000):
        source = f"10.0.{number // 250}.{number % 250}"
        was, now = chosen(algorithm, present, source), chosen(algorithm, rest, source)
        assert now == was or was == full.identity
        if was == full.identity:
            to_others[now] += 1
    assert len(to_others) == 5, "spread over all others"


def test_mapped_addresses_count_as_what_they_are_mapped_to() -> None:
    algorithm = Maglev(backends(9))
    for number in range(50):
        assert chosen(algorithm, backends(9), f"::ffff:10.0.0.{number}") == chosen(
            algorithm, backends(9), f"10.0.0.{number}"
        )


def test_backups_that_the_table_has_not_are_chosen_where_no_other_is() -> None:
    backup = Candidate("shop/main/backup@10.0.0.9:80#1")
    algorithm = Maglev(backends(3))
    assert algorithm.choose([backup], "10.0.0.1", NO) == backup
    assert algorithm.choose([], "10.0.0.1", NO) is None
    assert Maglev().choose([backup], "10.0.0.1", (random.random(), 0.5)) == backup
