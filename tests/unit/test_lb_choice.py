"""The algorithms of the balancer: fair by weight, stable where they promise it, never a backend of weight 0."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lb.core.algorithms import ALGORITHMS, made
from lb.core.choice import Candidate, LeastConnections, RoundRobin, SourceHash, TwoChoices, plain_address

CANDIDATES = st.lists(
    st.builds(Candidate, st.text("abcdef", min_size=1, max_size=4), st.floats(0, 256), st.integers(0, 50)),
    unique_by=lambda one: one.identity,
    max_size=8,
)
RANDOM = st.tuples(st.floats(0, 0.999999), st.floats(0, 0.999999))


@pytest.mark.parametrize("name", ALGORITHMS)
@given(candidates=CANDIDATES, source=st.ip_addresses().map(str), drawn=RANDOM)
def test_one_of_the_candidates_with_a_weight_is_chosen(
    name: str, candidates: list[Candidate], source: str, drawn: tuple[float, float]
) -> None:
    chosen = made(name, lambda: candidates).choose(candidates, source, drawn)
    present = [one for one in candidates if one.weight > 0]
    assert (chosen in present) if present else (chosen is None)


def test_round_robin_is_smooth() -> None:
    algorithm = RoundRobin()
    candidates = [Candidate("a", 5), Candidate("b", 1), Candidate("c", 1)]
    chosen = [algorithm.choose(candidates, "", (0, 0)) for _ in range(14)]
    assert "".join(one.identity for one in chosen if one) == "aabacaa" * 2


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_round_robin_gives_each_its_weight_in_every_cycle(weights: list[int]) -> None:
    algorithm = RoundRobin()
    candidates = [Candidate(str(index), weight) for index, weight in enumerate(weights)]
    for _ in range(3):
        found = Counter(one.identity for _ in range(sum(weights)) if (one := algorithm.choose(candidates, "", (0, 0))))
        assert found == {str(index): weight for index, weight in enumerate(weights)}


def test_one_that_comes_back_is_not_flooded() -> None:
    algorithm = RoundRobin()
    both = [Candidate("a"), Candidate("b")]
    for _ in range(100):
        algorithm.choose(both[:1], "", (0, 0))
    found = Counter(one.identity for _ in range(10) if (one := algorithm.choose(both, "", (0, 0))))
    assert found == {"a": 5, "b": 5}


@given(CANDIDATES)
def test_least_connections_finds_the_least_loaded(candidates: list[Candidate]) -> None:
    chosen = LeastConnections().choose(candidates, "", (0, 0))
    loads = [(one.connections + 1) / one.weight for one in candidates if one.weight > 0]
    assert (
        chosen is None if not loads else (chosen is not None and (chosen.connections + 1) / chosen.weight == min(loads))
    )


def test_least_connections_goes_round_among_equals() -> None:
    algorithm = LeastConnections()
    equals = [Candidate("a"), Candidate("b"), Candidate("c", 1, 7)]
    found = [one.identity for _ in range(4) if (one := algorithm.choose(equals, "", (0, 0)))]
    assert found == ["a", "b", "a", "b"]


def test_two_choices_are_nearly_even() -> None:
    generator, connections = random.Random(1), Counter({"a": 0, "b": 0, "c": 0, "d": 0})
    for _ in range(4000):
        candidates = [Candidate(name, 1, count) for name, count in sorted(connections.items())]
        chosen = TwoChoices().choose(candidates, "", (generator.random(), generator.random()))
        assert chosen is not None
        connections[chosen.identity] += 1
    assert max(connections.values()) - min(connections.values()) <= 8


def test_source_hash_moves_only_the_clients_of_a_backend_that_goes() -> None:
    candidates = [Candidate(name) for name in "abcde"]
    sources = [f"10.0.{one >> 8}.{one & 255}" for one in range(2000)]
    before = {source: SourceHash().choose(candidates, source, (0, 0)) for source in sources}
    after = {source: SourceHash().choose(candidates[:-1], source, (0, 0)) for source in sources}
    assert {before[source] for source in sources if before[source] != after[source]} == {candidates[-1]}


def test_source_hash_heeds_weights() -> None:
    candidates = [Candidate("a", 3), Candidate("b", 1)]
    found = Counter(SourceHash().choose(candidates, f"10.{one >> 8}.{one & 255}.1", (0, 0)) for one in range(8000))
    assert 0.72 < found[candidates[0]] / 8000 < 0.78


@pytest.mark.parametrize(
    ("text", "plain"),
    [("::ffff:10.0.0.1", "10.0.0.1"), ("10.0.0.1", "10.0.0.1"), ("fe80::1%eth0", "fe80::1"), ("", ""), ("x", "x")],
)
def test_a_mapped_address_counts_as_its_ipv4_address(text: str, plain: str) -> None:
    assert plain_address(text) == plain
