"""How many connections a worker hands to each of its siblings so that all have their share. Pure.

Every worker computes the same plan from the same counts, and carries out its own part: so several that have too many
do not fill the same gap twice.
"""

from __future__ import annotations

from collections.abc import Mapping

TOLERANCE = 0.1
"""A worker gives only when it is further than this above an even share, so that small drift moves nobody."""


def shares(counts: Mapping[int, int], own: int) -> dict[int, int]:
    """What worker `own` gives to each other worker. `counts`: connections by worker, `own` included."""
    order = sorted(counts)
    total = sum(counts.values())
    if counts[own] <= total / len(order) * (1 + TOLERANCE):
        return {}
    even, rest = divmod(total, len(order))
    # Who has more keeps the odd ones: fewer have to move.
    by_size = sorted(order, key=lambda worker: (-counts[worker], worker))
    wanted = {worker: even + (place < rest) for place, worker in enumerate(by_size)}
    givers = [(worker, counts[worker] - wanted[worker]) for worker in order if counts[worker] > wanted[worker]]
    begin = 0
    for worker, surplus in givers:
        if worker == own:
            break
        begin += surplus
    end = begin + max(0, counts[own] - wanted[own])
    plan: dict[int, int] = {}
    place = 0
    for worker in order:
        gap = max(0, wanted[worker] - counts[worker])
        part = min(end, place + gap) - max(begin, place)
        if part > 0:
            plan[worker] = part
        place += gap
    return plan
