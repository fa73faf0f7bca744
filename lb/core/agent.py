"""The words of HAProxy's agent-check: what a backend's agent says of it. No I/O.

One line of words, between blanks or commas, in any order and any case, up to the first CR or LF; what stands behind
`#` describes. What an agent does not speak of stays as it said last: only the agent takes back what the agent said.
"""

from __future__ import annotations

import re

import msgspec

from lb.core.choice import MAXIMUM_WEIGHT
from lb.core.standing import Administrative, Health

MAXIMUM_LINE_BYTES = 1024
MAXIMUM_DESCRIPTION = 200
"""Characters that are kept."""
MAXIMUM_MAXCONN = 1_000_000

_END = re.compile(rb"[\r\n\0]")
_BETWEEN = re.compile(r"[ \t,]+")
_PERCENT = re.compile(r"([0-9]{1,6})%")
_MAXCONN = re.compile(r"maxconn:([0-9]{1,9})", re.IGNORECASE)
_STATES = {one.value: one for one in Administrative}
_HEALTH = {"up": Health.UP} | dict.fromkeys(("down", "fail", "failed", "stopped"), Health.DOWN)


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """None: it has said nothing of that."""

    administrative: Administrative | None = None
    health: Health | None = None
    """UP: no objection to what the checks say. DOWN: down, whatever they say."""
    percent: int | None = None
    """Of the configured weight."""
    maxconn: int | None = None
    """In place of the configured one; 0: no limit."""
    health_word: str = ""
    """`down`, `failed` and `stopped` mean the same, but not to people."""
    description: str = ""
    unknown: tuple[str, ...] = ()
    """Words of the latest line that nobody knows; those beside them count."""

    def __str__(self) -> str:
        words = [] if self.administrative is None else [self.administrative.value]
        words += [self.health_word] if self.health_word else []
        words += [] if self.percent is None else [f"{self.percent}%"]
        words += [] if self.maxconn is None else [f"maxconn:{self.maxconn}"]
        words += [f"({self.description})"] if self.description else []
        return " ".join(words)


def line_of(data: bytes, is_end: bool) -> str | None:
    """The line that an answer begins with; None: it is not complete. `is_end`: nothing more will come."""
    found = _END.search(data)
    if found is None and not is_end and len(data) < MAXIMUM_LINE_BYTES:
        return None
    line = data[: found.start() if found else MAXIMUM_LINE_BYTES]
    return line.decode("utf-8", "replace")


def parse(line: str) -> Said:
    """The last word of a kind counts. Raises ValueError, in a few words, where nothing in it is known."""
    words, _, description = line.partition("#")
    fields: dict[str, object] = {}
    unknown = []
    for word in _BETWEEN.split(words.strip(" \t,")):
        found = _meaning(word)
        if found:
            fields.update(found)
        elif word:
            unknown.append(_printable(word)[:32])
    if not fields:
        raise ValueError(f"{unknown[0]}: is no word of an agent" if unknown else "an answer without a word")
    fields |= {"description": _printable(description.strip())[:MAXIMUM_DESCRIPTION], "unknown": tuple(unknown[:4])}
    return msgspec.convert(fields, Said)


def after(former: Said | None, said: Said) -> Said:
    """All that holds now."""
    if former is None:
        return said
    return Said(
        administrative=said.administrative or former.administrative,
        health=said.health or former.health,
        health_word=said.health_word or former.health_word,
        percent=former.percent if said.percent is None else said.percent,
        maxconn=former.maxconn if said.maxconn is None else said.maxconn,
        description=said.description,
        unknown=said.unknown,
    )


def weight_of(configured: int, said: Said | None) -> float:
    if said is None or said.percent is None:
        return float(configured)
    return min(configured * said.percent / 100, float(MAXIMUM_WEIGHT))


def maxconn_of(configured: int | None, said: Said | None) -> int | None:
    return configured if said is None or said.maxconn is None else said.maxconn or None


def _meaning(word: str) -> dict[str, object]:
    lower = word.lower()
    if lower in _STATES:
        return {"administrative": _STATES[lower]}
    if lower in _HEALTH:
        return {"health": _HEALTH[lower], "health_word": lower}
    if found := _PERCENT.fullmatch(word):
        return {"percent": int(found[1])}
    if found := _MAXCONN.fullmatch(word):
        return {"maxconn": min(int(found[1]), MAXIMUM_MAXCONN)}
    return {}


def _printable(text: str) -> str:
    return "".join(one if one.isprintable() else "?" for one in text)
