"""Taking apart what a TOML file says: what is wrong is told with its line, and the nearest key that is known."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from handoff.durations import MAX_DURATION_SECONDS, parse_duration
from handoff.errors import UsageError
from handoff.option_table import shown_value
from lb.positions import Path, Positions

MAXIMUM_WORDS = 64
"""Of a list of words."""

Read = Callable[[Any], Any]
"""Of a value; raises ValueError with what was expected."""


class TableReader:
    """Of one file. Whatever it raises names the file, the line and the key."""

    def __init__(self, shown: str, positions: Positions) -> None:
        self._shown = shown
        self._positions = positions

    def _fields(self, path: Path, table: Any, known: Mapping[str, tuple[str, Read]]) -> dict[str, Any]:
        """The values of a table, under the names of the fields."""
        self._expect_table(path, table)
        self._refuse_unknown(path, table, set(known))
        values = {}
        for key, value in table.items():
            field, read = known[key]
            try:
                values[field] = read(value)
            except ValueError as error:
                self._fail((*path, key), key, f"{shown_value(value)}: {error}")
            except UsageError as error:
                self._fail((*path, key), key, error.message)
        return values

    def _expect_table(self, path: Path, table: Any, subject: str | None = None) -> None:
        if not isinstance(table, dict):
            self._fail(path, subject or str(path[-1]), "expected a table")

    def _refuse_unknown(self, path: Path, table: dict[str, Any], known: set[str]) -> None:
        for key in table:
            if key not in known:
                near = difflib.get_close_matches(key, sorted(known), n=1)
                hint = f'did you mean "{near[0]}"?' if near else f"known here: {', '.join(sorted(known))}"
                self._fail((*path, key), shown_value(key), f"is no key that is known here; {hint}")

    def _refuse_twice(self, names: list[tuple[Path, str]]) -> None:
        seen: set[str] = set()
        for path, name in names:
            if name in seen:
                self._fail(path, name, "is there twice; give each a name of its own")
            seen.add(name)

    def _fail(self, path: Path, subject: str, problem: str) -> None:
        separator = " " if problem.startswith("is ") else ": "
        raise UsageError(f"{self._where(path)}: {subject}{separator}{problem}")

    def _where(self, path: Path) -> str:
        """The file, and the line of the key where it has one."""
        line = self._positions.line(path)
        return self._shown if line is None else f"{self._shown}: line {line}"


# --- how values are read --------------------------------------------------------------------------------------------


def text(is_good: Callable[[str], object], expected: str) -> Read:
    def read(value: Any) -> str:
        if not isinstance(value, str) or not is_good(value):
            raise ValueError(f"expected {expected}")
        return value

    return read


def choice(*choices: str) -> Read:
    return text(choices.__contains__, " or ".join(f'"{one}"' for one in choices))


def number(low: int, high: int) -> Read:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"expected a whole number from {low} to {high}")
        return value

    return read


def read_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def duration(value: Any) -> float:
    if not isinstance(value, str):
        raise ValueError('expected a duration such as "5s"')
    seconds = parse_duration(value)
    if not 0 < seconds <= MAX_DURATION_SECONDS:
        raise ValueError("expected a duration above 0s and of at most 168h")
    return seconds


def duration_or_none(value: Any) -> float | None:
    return None if value == "none" else duration(value)


def list_of(is_good: Callable[[str], object], expected: str) -> Read:
    def read(value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not 1 <= len(value) <= MAXIMUM_WORDS:
            raise ValueError(f"expected a list of {expected}, 1 to {MAXIMUM_WORDS}")
        if not all(isinstance(one, str) and is_good(one) for one in value):
            raise ValueError(f"expected a list of {expected}")
        return tuple(value)

    return read
