"""Where in a TOML text a key is written, which the parser does not tell."""

from __future__ import annotations

import re
from collections import Counter

_HEADER = re.compile(r"\s*\[(\[)?\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?")
_KEY = re.compile(r"\s*([A-Za-z0-9_\-]+|\"[^\"]*\"|'[^']*')\s*(?:\.[^=]*)?=")
_PART = re.compile(r"[A-Za-z0-9_\-]+|\"[^\"]*\"|'[^']*'")

Path = tuple[str | int, ...]


class Positions:
    """Line numbers, from 1, by the path of a key: ("service", 0, "check", "rise")."""

    def __init__(self, text: str) -> None:
        self._lines: dict[Path, int] = {}
        counts: Counter[str] = Counter()
        table: Path = ()
        for number, line in enumerate(text.splitlines(), 1):
            header = _HEADER.fullmatch(line)
            if header is not None:
                if header[1]:
                    name = ".".join(_PART.findall(header[2]))
                    counts[name] += 1
                    for inner in [one for one in counts if one.startswith(f"{name}.")]:
                        del counts[inner]  # the tables within the new one are counted anew
                table = _path(header[2], counts)
                for length in range(1, len(table) + 1):  # [check.web] begins the table "check", if nothing has before
                    self._lines.setdefault(table[:length], number)
            elif (key := _KEY.match(line)) is not None:
                self._lines.setdefault((*table, _plain(key[1])), number)

    def line(self, path: Path) -> int | None:
        """Of the key, or of the nearest thing around it that has a line."""
        while path:
            if path in self._lines:
                return self._lines[path]
            path = path[:-1]
        return None


def _path(header: str, counts: Counter[str]) -> Path:
    """A header names the last one of an array of tables; so far it has as many as were counted."""
    found: list[str | int] = []
    parts = _PART.findall(header)
    for index, part in enumerate(parts, 1):
        found.append(_plain(part))
        count = counts[".".join(parts[:index])]
        if count:
            found.append(count - 1)
    return tuple(found)


def _plain(part: str) -> str:
    return part[1:-1] if part[:1] in ("'", '"') else part
