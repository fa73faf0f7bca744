"""docs/edge-cases.md names code and tests that are there."""

from __future__ import annotations

import pytest

from tests.unit.edge_case_tables import ROOT, EdgeCase, edge_cases, problems_of

CASES = edge_cases(ROOT / "docs" / "edge-cases.md")


def test_every_number_is_there_once() -> None:
    assert [one.number for one in CASES] == list(range(1, 51))


@pytest.mark.parametrize("one", CASES, ids=lambda one: str(one.number))
def test_the_code_and_the_tests_of_an_edge_case_are_there(one: EdgeCase) -> None:
    assert problems_of(one) == []


def test_a_row_that_names_what_is_not_there_is_noticed() -> None:
    wrong = EdgeCase(1, "x", "`handoff/absent.py`", "`unit/test_loop.py::test_absent`, `unit/absent.py::test_x`")
    assert problems_of(wrong) == [
        "no file handoff/absent.py",
        "no test unit/test_loop.py::test_absent",
        "no test unit/absent.py::test_x",
    ]
    assert problems_of(EdgeCase(1, "x", "", "–")) == ["names no code", "names no test"]
    assert problems_of(EdgeCase(1, "x", "later: it comes", "–")) == []
