"""The balancers' bench: ratios, bests, and the program at both ends."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench.balancers import BALANCERS
from bench.lb import SCENARIOS, Round, ratios_of, row_of
from bench.peer import Peer


def rounds(*values: float, measure: str = "CPU µs/request") -> list[Round]:
    return [Round({measure: value}, 0.0) for value in values]


def test_ratios_are_taken_round_by_round() -> None:
    assert ratios_of("CPU µs/request", rounds(2.0, 9.0), rounds(1.0, 3.0)) == [2.0, 3.0]
    assert ratios_of("CPU µs/request", rounds(2.0, 9.0), rounds(0.0, 3.0)) == [3.0]


def test_the_best_of_a_cost_is_the_least_and_of_a_rate_the_most() -> None:
    row = row_of("CPU µs/request", rounds(4.0, 2.0, 3.0), rounds(2.0, 4.0, 1.0))
    assert (row["median"], row["best"], row["best_ratio"]) == (3.0, 2.0, 2.0)
    assert (row["ratio"], row["ratios"]) == (2.0, [2.0, 0.5, 3.0])
    rates = row_of("GB/s", rounds(4.0, 2.0, measure="GB/s"), ())
    assert rates == {"median": 3.0, "best": 4.0, "rounds": [4.0, 2.0]}


def test_names_of_balancers_and_measures_are_those_that_the_goals_speak_of() -> None:
    assert len({kind.name for kind in BALANCERS}) == len(BALANCERS)
    assert all(scenario.goals or scenario.limits for scenario in SCENARIOS.values())


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    return Peer(tmp_path_factory.mktemp("peer"))


def test_the_loads_get_what_they_ask_the_server_for(peer: Peer) -> None:
    with peer.serving() as port:
        assert peer.burst(port, 50)["count"] == 50
        assert peer.latency(port, 500, 0.1, 4)["count"] == 50
        for direction in ("down", "up"):
            assert peer.bulk(port, direction, 3, 6_000_000)["bytes"] == 6_000_000  # type: ignore[arg-type]
        with peer.holding(port, 20, 30.0):
            assert peer.burst(port, 5)["count"] == 5


def test_a_load_that_nobody_answers_says_so(peer: Peer, tmp_path: Path) -> None:
    with peer.serving() as port:
        pass
    with pytest.raises(RuntimeError, match=r"^burst: "):
        peer.burst(port, 1)
