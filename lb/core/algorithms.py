"""The algorithms by the names that lb.toml has for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lb.core.choice import Algorithm, Candidate, LeastConnections, RoundRobin, SourceHash, TwoChoices
from lb.core.latency import QuickerOfTwo
from lb.core.maglev import Maglev

ALGORITHMS: dict[str, Callable[[], Algorithm]] = {
    "roundrobin": RoundRobin,
    "leastconn": LeastConnections,
    "random": TwoChoices,
    "source": SourceHash,
    "maglev": Maglev,
    "ewma": QuickerOfTwo,
}
NEED_COUNTS = frozenset(("leastconn", "random", "ewma"))
"""Those that look at the connections of a backend."""


def made(name: str, everybody: Callable[[], Sequence[Candidate]]) -> Algorithm:
    """`everybody`: all that may get connections, for the one that must know."""
    return Maglev(everybody()) if name == "maglev" else ALGORITHMS[name]()
