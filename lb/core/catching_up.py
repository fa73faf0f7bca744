"""What a balancer that starts takes from one that ran meanwhile: newer revisions of its services. No I/O."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from lb.core.model import Service
from lb.core.overrides import Overrides, ServiceOverride


def caught_up(
    own: Overrides, theirs: Overrides, services: Iterable[Service], peer: str, *, is_new: bool
) -> tuple[Overrides, tuple[str, ...]]:
    """Ours, with what is newer there; and a line for each revision that was taken, or could not be.

    `is_new`: ours is the beginning of a balancer that never ran, and takes everything: drains and weights, too. They
    have no revision, so that otherwise nobody knows which of the two is newer. The file is still to have its say.
    """
    notes: list[str] = []
    known, desired = dict(own.services), dict(own.desired)
    for service in services:
        other = theirs.services.get(service.name)
        present = known.get(service.name) or ServiceOverride(configured=service.active)
        if other is None or not _is_newer(other, present):
            continue
        problem = _problem(other, service)
        if problem is not None:
            notes.append(f"{service.name}: revision {other.revision} of {peer} is not taken: {problem}")
            continue
        known[service.name] = msgspec.structs.replace(other, configured=service.active)
        if service.name in theirs.desired:  # it is in there already
            desired[service.name] = max(theirs.desired[service.name], desired.get(service.name, (0, 0)))
        shares = other.shares.shares if other.shares is not None else {service.active: 100}
        shown = ", ".join(f"{pool} {share} %" for pool, share in shares.items())
        notes.append(f"{service.name}: revision {other.revision} is taken from {peer}: {shown}")
    fences = {**own.fences, **{name: max(token, own.fences.get(name, 0)) for name, token in theirs.fences.items()}}
    base = theirs if is_new else own
    found = msgspec.structs.replace(
        base, version=own.version, number=own.number, services=known, fences=fences, desired=desired
    )
    return found, tuple(notes)


def _is_newer(other: ServiceOverride, present: ServiceOverride) -> bool:
    if other.revision != present.revision:
        return other.revision > present.revision
    if other.shares is None or present.shares is None or other.shares.shares == present.shares.shares:
        return False
    return other.shares.at > present.shares.at  # each was switched while it did not see the other one


def _problem(other: ServiceOverride, service: Service) -> str | None:
    if other.shares is None:
        if other.configured == service.active:
            return None
        return f"its file says active = {other.configured}, ours {service.active}"
    unknown = sorted(set(other.shares.shares) - set(service.pools))
    return f"there is no pool {', '.join(unknown)} here" if unknown else None
