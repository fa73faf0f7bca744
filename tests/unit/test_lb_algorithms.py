"""Algorithms in a relay worker: what they are told of the backends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lb.core.algorithms import ALGORITHMS, NEED_COUNTS, made
from lb.core.maglev import Maglev
from lb.core.model import Timeouts
from tests.unit.test_lb_engine import Rig, endpoint, nobody_there


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made_rig = Rig(tmp_path)
    yield made_rig
    made_rig.close()


def test_each_name_has_its_algorithm() -> None:
    assert set(ALGORITHMS) >= NEED_COUNTS
    assert all(type(made(name, lambda: ())) is ALGORITHMS[name] for name in ALGORITHMS)


def test_maglev_leads_a_client_to_one_backend_until_that_one_is_gone(rig: Rig) -> None:
    backends = {name: rig.backend() for name in "abc"}
    endpoints = [endpoint(one, name) for name, one in backends.items()]
    rig.serve(*endpoints, algorithm="maglev", slow_start_seconds=1000.0)
    for number in range(1, 7):
        rig.client()
        rig.until(lambda wanted=number: sum(one.look() for one in backends.values()) == wanted, "relayed")  # type: ignore[misc]
    [chosen] = [name for name, one in backends.items() if one.accepted]
    full = [one if one.name != chosen else endpoint(backends[chosen], chosen, maxconn=6) for one in endpoints]
    rig.serve(*full, algorithm="maglev")
    rig.client()
    others = [one for name, one in backends.items() if name != chosen]
    rig.until(lambda: sum(one.look() for one in others) == 1, "full: the next one has it")
    rig.serve(*[one for one in endpoints if one.name != chosen], algorithm="maglev")
    dispatcher = rig.engine._services["shop"].dispatcher
    rig.client()
    rig.until(lambda: sum(one.look() for one in others) == 2, "it is gone: another one has it")
    algorithm = dispatcher._algorithms["main"]
    assert isinstance(algorithm, Maglev)
    assert len(set(algorithm._table)) == 2


def test_ewma_is_told_of_times_and_of_failures(rig: Rig) -> None:
    good = rig.backend()
    rig.serve(
        endpoint(nobody_there(), "bad"),
        endpoint(good, "good"),
        algorithm="ewma",
        timeouts=Timeouts(connect_seconds=3.0),
    )
    for number in range(1, 9):
        rig.client()
        rig.until(lambda wanted=number: good.look() == wanted, "relayed")  # type: ignore[misc]
    targets = {one.endpoint.name: one for one in rig.engine._targets}
    now = rig.loop.now
    assert len(rig.failures) == 1, "after one failure the other one is the better of two"
    assert 0 < targets["bad"].latency.read(now) <= 3.0
    assert targets["good"].latency.read(now) < targets["bad"].latency.read(now)
