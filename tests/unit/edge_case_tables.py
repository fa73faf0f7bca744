"""Tables of edge cases: number, case, where it stands in the code, and the tests that would fail without it."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
LATER = "later: "
"""Begins the cell of the code where that is still to come."""


class EdgeCase(NamedTuple):
    number: int
    case: str
    code: str
    tests: str

    @property
    def is_later(self) -> bool:
        return self.code.startswith(LATER)


def edge_cases(document: Path) -> list[EdgeCase]:
    found = []
    for line in document.read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4 and cells[0].isdigit():
            found.append(EdgeCase(int(cells[0]), *cells[1:]))
    return found


def problems_of(one: EdgeCase) -> list[str]:
    """What of this row is not there."""
    files = re.findall(r"`([^`]+)`", one.code)
    tests = re.findall(r"`([^`]+)`", one.tests)
    found = [f"no file {name}" for name in files if not (ROOT / name).is_file()]
    found += [f"no test {name}" for name in tests if not _is_test(name)]
    if not one.is_later:
        found += ["names no code"] * (not files) + ["names no test"] * (not tests)
    return found


def _is_test(name: str) -> bool:
    file, _, function = name.partition("::")
    path = ROOT / "tests" / file
    return path.is_file() and function in _functions(path)


@functools.cache
def _functions(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(), str(path))
    return frozenset(
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    )
