"""Which backend gets the next connection: algorithms over candidates, which the caller has made sure may get one.

All are weighted; a weight of 0 never gets a connection. No I/O; random numbers are arguments.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

MAXIMUM_WEIGHT = 256


class Candidate(NamedTuple):
    """One backend as the algorithms see it. `identity` is its own for as long as it is configured.

    `seconds`: how long it takes to be connected to, lately; of use for `ewma`.
    """

    identity: str
    weight: float = 1.0
    connections: int = 0
    seconds: float = 0.0


class Algorithm(Protocol):
    """`source`: the client's address; `random`: two independent numbers in [0, 1)."""

    def choose(self, candidates: Sequence[Candidate], source: str, random: tuple[float, float]) -> Candidate | None: ...


class RoundRobin:
    """Smooth weighted round robin, as nginx has it: 5, 1, 1 gives a a b a c a a, and never five a in a row.

    Each backend's credit grows by its weight in each round; who has most is chosen, and pays the sum of the weights.
    """

    def __init__(self) -> None:
        self._credits: dict[str, float] = {}

    def choose(self, candidates: Sequence[Candidate], source: str, random: tuple[float, float]) -> Candidate | None:
        present = [one for one in candidates if one.weight > 0]
        if not present:
            return None
        # Who is not there any more, or just now, starts from nothing when it comes back: no burst makes up for it.
        credit = {one.identity: self._credits.get(one.identity, 0.0) + one.weight for one in present}
        chosen = max(present, key=lambda one: credit[one.identity])
        credit[chosen.identity] -= sum(one.weight for one in present)
        self._credits = credit
        return chosen


class LeastConnections:
    """Fewest connections for its weight; among equals, round robin."""

    def __init__(self) -> None:
        self._round_robin = RoundRobin()

    def choose(self, candidates: Sequence[Candidate], source: str, random: tuple[float, float]) -> Candidate | None:
        present = [one for one in candidates if one.weight > 0]
        if not present:
            return None
        least = min(_load(one) for one in present)
        return self._round_robin.choose([one for one in present if _load(one) == least], source, random)


class TwoChoices:
    """The less loaded of two that are drawn by weight: nearly as even as least connections, without a herd.

    Mitzenmacher, The Power of Two Choices in Randomized Load Balancing, 2001.
    """

    def choose(self, candidates: Sequence[Candidate], source: str, random: tuple[float, float]) -> Candidate | None:
        two = drawn_two(candidates, random)
        return min(two, key=_load) if two else None


class SourceHash:
    """The same backend for the same client, for as long as it may get connections.

    Weighted rendezvous hashing: when a backend comes or goes only its own share of the clients moves.
    Thaler, Ravishankar, 1998; weights: Schindelhauer, Schomaker, 2005.
    """

    def choose(self, candidates: Sequence[Candidate], source: str, random: tuple[float, float]) -> Candidate | None:
        present = [one for one in candidates if one.weight > 0]
        client = plain_address(source)
        return max(present, key=lambda one: _score(client, one), default=None)


def plain_address(text: str) -> str:
    """An address without its port's scope: a v4-mapped one counts as its IPv4 address; a zone is left out."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:  # a client on a unix socket has none
        return text
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def steady_name(identity: str) -> str:
    """The part of an identity that is the same in every balancer, and after a removal and return."""
    return identity.rpartition("#")[0] or identity


def drawn_two(candidates: Sequence[Candidate], random: tuple[float, float]) -> list[Candidate]:
    """By weight; fewer where there are not so many."""
    present = [one for one in candidates if one.weight > 0]
    if len(present) < 2:
        return present
    first = _drawn(present, random[0])
    return [first, _drawn([one for one in present if one is not first], random[1])]


def _load(one: Candidate) -> float:
    """What it would have with this connection."""
    return (one.connections + 1) / one.weight


def _drawn(present: Sequence[Candidate], random: float) -> Candidate:
    at = random * sum(one.weight for one in present)
    for one in present:
        at -= one.weight
        if at < 0:
            return one
    return present[-1]  # rounding


def _score(client: str, one: Candidate) -> float:
    digest = hashlib.blake2b(f"{client}\0{steady_name(one.identity)}".encode(), digest_size=8).digest()
    uniform = (int.from_bytes(digest, "big") + 0.5) / 2**64
    return -one.weight / math.log(uniform)
