"""Maglev hashing: a table of slots that backends fill in turn, each in an order of its own. Pure.

The same client gets the same backend in every relay worker and every balancer, since the table follows from names and
weights alone. When a backend comes or goes, its share of the clients moves, and a few others.
Eisenbud et al., Maglev: A Fast and Reliable Software Network Load Balancer, NSDI 2016, 3.4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

from lb.core.choice import Candidate, SourceHash, plain_address, steady_name

SLOTS = 4099
"""A prime. Backends of equal weight have the same number of slots, or one more: with 100 of them 2.5 % apart."""


class Maglev:
    """Of one pool, for as long as its backends are the same. `everybody`: all that may get connections.

    One of them that cannot be chosen, since it is full or was tried, is passed over: its clients go to the backend of
    the next slot.
    """

    def __init__(self, everybody: Sequence[Candidate] = ()) -> None:
        present = sorted((steady_name(one.identity), one.weight) for one in everybody if one.weight > 0)
        self._table = filled(tuple(present)) if present else ()
        self._fallback = SourceHash()

    def choose(self, candidates: Sequence[Candidate], source: str, random: tuple[float, float]) -> Candidate | None:
        by_name = {steady_name(one.identity): one for one in candidates if one.weight > 0}
        table = self._table
        if by_name and table:
            first = _number("client", plain_address(source)) % SLOTS
            for place in range(SLOTS):
                found = by_name.get(table[(first + place) % SLOTS])
                if found is not None:
                    return found
        return self._fallback.choose(candidates, source, random)  # backups, for whom no other is there


@lru_cache(maxsize=32)
def filled(backends: tuple[tuple[str, float], ...]) -> tuple[str, ...]:
    """The table for these names and weights, which are above 0."""
    heaviest = max(weight for _, weight in backends)
    orders = [(_number("offset", name) % SLOTS, _number("skip", name) % (SLOTS - 1) + 1) for name, _ in backends]
    places = [offset for offset, _ in orders]
    credits = [1.0] * len(backends)  # everybody is on in the first round
    table: list[str | None] = [None] * SLOTS
    left = SLOTS
    while True:
        for index, (name, weight) in enumerate(backends):
            is_on = credits[index] >= 1.0  # a lighter one is not in every round
            credits[index] += weight / heaviest - is_on
            if not is_on:
                continue
            place, skip = places[index], orders[index][1]
            while table[place] is not None:
                place = (place + skip) % SLOTS
            table[place] = name
            places[index] = (place + skip) % SLOTS
            left -= 1
            if not left:
                return tuple(one for one in table if one is not None)


def _number(purpose: str, text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "big")
