"""The peak of connect times, and the quicker of two."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lb.core.choice import Candidate
from lb.core.latency import DECAY_SECONDS, PeakAverage, QuickerOfTwo

SECONDS = st.floats(0, 10)


@given(st.lists(st.tuples(SECONDS, st.floats(0, 5)), min_size=1, max_size=20))
def test_it_lies_between_what_was_seen_and_takes_a_peak_at_once(seen: list[tuple[float, float]]) -> None:
    average, now = PeakAverage(), 100.0
    for seconds, later in seen:
        now += later
        before = average.read(now)
        average.observe(seconds, now)
        assert average.read(now) >= seconds or average.read(now) <= before
        if seconds >= before:
            assert average.read(now) == seconds
        assert average.read(now) <= max(one for one, _ in seen)


def test_a_peak_is_forgotten_slowly() -> None:
    average = PeakAverage()
    average.observe(5.0, 0.0)
    average.observe(0.001, 1.0)
    assert average.read(1.0) > 4
    for second in range(2, 150):
        average.observe(0.001, float(second))
    assert average.read(149.0) == pytest.approx(0.001, rel=0.01)


def test_who_is_not_asked_any_more_is_tried_again_one_day() -> None:
    average = PeakAverage()
    average.observe(5.0, 0.0)
    assert average.read(DECAY_SECONDS) == pytest.approx(5.0 / 2.718, rel=0.01)
    assert average.read(20 * DECAY_SECONDS) < 1e-6


def counted(candidates: list[Candidate]) -> Counter[str]:
    random, algorithm = Random(7), QuickerOfTwo()
    found: Counter[str] = Counter()
    for _ in range(1000):
        chosen = algorithm.choose(candidates, "", (random.random(), random.random()))
        assert chosen is not None
        found[chosen.identity] += 1
    return found


def test_the_quicker_one_gets_more_and_the_slower_ones_no_herd() -> None:
    found = counted([Candidate("quick", seconds=0.001), *(Candidate(f"slow{n}", seconds=0.02) for n in range(4))])
    assert 300 < found["quick"] < 500, "each time that it is one of the two"
    assert all(found[f"slow{n}"] > 80 for n in range(4))


def test_connections_and_weight_count_as_well() -> None:
    assert counted([Candidate("a", 1, 30, 0.001), Candidate("b", 1, 0, 0.01)]) == {"b": 1000}
    assert counted([Candidate("a", 10, 30, 0.001), Candidate("b", 1, 30, 0.001)]) == {"a": 1000}
    assert counted([Candidate("a", 1, 3, 0.0), Candidate("b", 1, 0, 0.00001)]) == {"b": 1000}, "equally quick"


def test_one_alone_and_nobody() -> None:
    algorithm = QuickerOfTwo()
    assert algorithm.choose([Candidate("a"), Candidate("b", 0)], "", (0.5, 0.5)) == Candidate("a")
    assert algorithm.choose([Candidate("b", 0)], "", (0.5, 0.5)) is None
