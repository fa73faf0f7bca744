"""The layer of run-time changes over the configuration: who changed what, why, and until when. Plain data, no I/O.

It outlives reloads, crashes and reboots; so its times are those of the wall clock. With each change stands what the
file said then: where the file says something else by now, the file wins, and that is said.

Backends are keyed `SERVICE/POOL/NAME`; only the name may hold a slash.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

import msgspec

from lb.core.model import Backend, Balancer, Service

VERSION = 1
MAXIMUM_FENCES = 1024
MAXIMUM_HISTORY = 16
"""How many switches back a service remembers."""
MAXIMUM_INCARNATIONS = 4096
"""Of those that were removed longest ago the count begins anew."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    who: str = ""
    why: str = ""
    at: float
    until: float | None = None
    configured: str = ""
    """What the file said then of what is changed here."""


class StateChange(Change, frozen=True):
    state: Literal["ready", "drain", "maint"]
    """`ready`: although its agent says otherwise."""
    closing_at: float | None = None
    """From then on what is left is closed."""


class WeightChange(Change, frozen=True):
    weight: int


class Added(Change, frozen=True):
    backend: Backend


class Removed(Change, frozen=True):
    """A backend that stands in the file."""


class Shares(msgspec.Struct, frozen=True, kw_only=True):
    """How new connections are divided among pools, in percent, by one revision of a service."""

    shares: dict[str, int]
    who: str = ""
    why: str = ""
    at: float


class ServiceOverride(msgspec.Struct, frozen=True, kw_only=True):
    revision: int = 1
    configured: str
    """The active pool of the file."""
    shares: Shares | None = None
    """None: as configured."""
    history: tuple[Shares, ...] = ()
    """Of former revisions, the latest last."""
    closing: dict[str, float] = {}
    """Pools that were switched away from, and from when on what they have is closed."""


class Overrides(msgspec.Struct, frozen=True, kw_only=True):
    version: int = VERSION
    number: int = 0
    """Grows with each change: of two, the higher one counts."""
    states: dict[str, StateChange] = {}
    weights: dict[str, WeightChange] = {}
    added: dict[str, Added] = {}
    removed: dict[str, Removed] = {}
    services: dict[str, ServiceOverride] = {}
    incarnations: dict[str, int] = {}
    """Of `SERVICE/POOL/NAME@ADDRESS` that were removed: the number that the next one gets."""
    fences: dict[str, int] = {}
    """The highest token that was shown, by the name of the lock."""
    desired: dict[str, tuple[int, int]] = {}
    """By service: token and version of what was taken last of what rollouts want (see lb.core.desired)."""


def later(one: Overrides, other: Overrides | None) -> Overrides:
    """The first, unless the other one is of a later change."""
    return other if other is not None and other.number > one.number else one


def fenced(overrides: Overrides, fence: str, token: int) -> Overrides | None:
    """With this token as the highest; None: a higher one was seen."""
    highest = overrides.fences.get(fence, 0)
    if token < highest:
        return None
    if token == highest:
        return overrides
    fences = {**overrides.fences, fence: token}
    if len(fences) > MAXIMUM_FENCES:
        del fences[next(iter(fences))]
    return msgspec.structs.replace(overrides, fences=fences)


# --- what holds -----------------------------------------------------------------------------------------------------


def key_of(service: str, pool: str, name: str) -> str:
    return f"{service}/{pool}/{name}"


def identity_of(overrides: Overrides, service: str, pool: str, name: str, address: str) -> str:
    place = f"{key_of(service, pool, name)}@{address}"
    return f"{place}#{overrides.incarnations.get(place, 1)}"


def pools_of(service: Service, overrides: Overrides) -> dict[str, tuple[Backend, ...]]:
    """What the file has, without what was removed, and what was added."""
    return {
        pool: tuple(one for one in backends if key_of(service.name, pool, one.name) not in overrides.removed)
        + tuple(
            added.backend
            for key, added in overrides.added.items()
            if key == key_of(service.name, pool, added.backend.name)
        )
        for pool, backends in service.pools.items()
    }


def shares_of(service: Service, overrides: Overrides) -> dict[str, int]:
    override = overrides.services.get(service.name)
    return {service.active: 100} if override is None or override.shares is None else override.shares.shares


def revision_of(service: str, overrides: Overrides) -> int:
    override = overrides.services.get(service)
    return 1 if override is None else override.revision


def said_of_weight(backend: Backend) -> str:
    return f"{backend.address} weight {backend.weight}"


def said_of(backend: Backend) -> str:
    maxconn = "" if backend.maxconn is None else f" maxconn {backend.maxconn}"
    return f"{said_of_weight(backend)}{maxconn}{' backup' if backend.backup else ''}"


# --- changes --------------------------------------------------------------------------------------------------------

_K = TypeVar("_K", bound=Change)


def without(changes: Mapping[str, _K], *keys: str) -> dict[str, _K]:
    return {key: change for key, change in changes.items() if key not in keys}


def with_shares(
    overrides: Overrides, service: Service, shares: Shares, closing: Mapping[str, float] | None = None
) -> Overrides:
    """The next revision of a service, if the shares are others. Pools that get a share are not closed any more."""
    present = overrides.services.get(service.name) or ServiceOverride(configured=service.active)
    former = present.shares or Shares(shares={present.configured: 100}, at=shares.at)
    closes = {**present.closing, **(closing or {})}
    changed = msgspec.structs.replace(
        present, closing={pool: at for pool, at in closes.items() if pool not in shares.shares}
    )
    if former.shares != shares.shares:
        history = (*present.history, former)[-MAXIMUM_HISTORY:]
        changed = msgspec.structs.replace(changed, revision=present.revision + 1, shares=shares, history=history)
    return msgspec.structs.replace(overrides, services={**overrides.services, service.name: changed})


def retired(overrides: Overrides, identities: Iterable[str]) -> Overrides:
    """These backends are gone: who comes to the same place is another one."""
    incarnations = dict(overrides.incarnations)
    for identity in identities:
        place, _, number = identity.rpartition("#")
        if incarnations.get(place, 1) > int(number):
            continue
        incarnations.pop(place, None)  # the latest stand last
        incarnations[place] = int(number) + 1
    kept = dict(list(incarnations.items())[-MAXIMUM_INCARNATIONS:])
    return msgspec.structs.replace(overrides, incarnations=kept)


# --- what does not hold any more ------------------------------------------------------------------------------------


def expired(overrides: Overrides, now: float) -> tuple[Overrides, tuple[str, ...]]:
    """Without what was to hold until then, by the wall clock; and a line for each that is over."""

    def is_over(change: Change) -> bool:
        return change.until is not None and change.until <= now

    notes = [f"{key}: {one.state} is over" for key, one in overrides.states.items() if is_over(one)]
    notes += [f"{key}: weight {one.weight} is over" for key, one in overrides.weights.items() if is_over(one)]
    if not notes:
        return overrides, ()
    states = {key: one for key, one in overrides.states.items() if not is_over(one)}
    weights = {key: one for key, one in overrides.weights.items() if not is_over(one)}
    return msgspec.structs.replace(overrides, states=states, weights=weights), tuple(notes)


def next_expiry(overrides: Overrides) -> float | None:
    changes = (*overrides.states.values(), *overrides.weights.values())
    return min((change.until for change in changes if change.until is not None), default=None)


def settled(overrides: Overrides, balancer: Balancer, now: float) -> tuple[Overrides, tuple[str, ...]]:
    """Over this configuration: what the file contradicts by now is dropped, with a line for each. Idempotent.

    A drain or maint is of an address; a weight of address and weight; a removal of all that the file says of the
    backend; shares are of the active pool.
    """
    configured = {
        key_of(service.name, pool, backend.name): backend
        for service in balancer.services
        for pool, backends in service.pools.items()
        for backend in backends
    }
    pools = {f"{service.name}/{pool}" for service in balancer.services for pool in service.pools}
    notes: list[str] = []
    removed = _still(overrides.removed, {key: said_of(one) for key, one in configured.items()}, "its removal", notes)
    added = {}
    for key, one in overrides.added.items():
        if key in configured and key not in removed:
            notes.append(f"{key}: was added{_by(one)}; dropped, it stands in the file by now")
        elif key.removesuffix(f"/{one.backend.name}") not in pools:
            notes.append(f"{key}: was added{_by(one)}; dropped, its pool is gone from the file")
        else:
            added[key] = one
    present = {key: one for key, one in configured.items() if key not in removed}
    present |= {key: one.backend for key, one in added.items()}
    states = _still(overrides.states, {key: one.address for key, one in present.items()}, "drain or maint", notes)
    weights = _still(overrides.weights, {key: said_of_weight(one) for key, one in present.items()}, "weight", notes)
    services = dict(overrides.services)
    for service in balancer.services:
        services[service.name] = _settled_service(services.get(service.name), service, now, notes)
    changed = msgspec.structs.replace(
        overrides, states=states, weights=weights, added=added, removed=removed, services=services
    )
    return changed, tuple(notes)


def _still(changes: Mapping[str, _K], said: Mapping[str, str], what: str, notes: list[str]) -> dict[str, _K]:
    kept = {}
    for key, change in changes.items():
        if said.get(key) == change.configured:
            kept[key] = change
        else:
            by_now = f"says {said[key]} by now, not {change.configured}" if key in said else "does not have it any more"
            notes.append(f"{key}: {what}{_by(change)} dropped, the file {by_now}")
    return kept


def _settled_service(
    present: ServiceOverride | None, service: Service, now: float, notes: list[str]
) -> ServiceOverride:
    if present is None:
        return ServiceOverride(configured=service.active)
    history = tuple(one for one in present.history if set(one.shares) <= set(service.pools))
    is_possible = present.shares is None or set(present.shares.shares) <= set(service.pools)
    if present.configured == service.active and is_possible:
        if history == present.history and set(present.closing) <= set(service.pools):
            return present
        closing = {pool: at for pool, at in present.closing.items() if pool in service.pools}
        return msgspec.structs.replace(present, history=history, closing=closing)
    former = present.shares or Shares(shares={present.configured: 100}, at=now)
    if present.shares is not None and former.shares != {service.active: 100}:
        was = ", ".join(f"{pool} {share} %" for pool, share in former.shares.items())
        why = f"says active = {service.active} by now" if is_possible else "does not have such a pool any more"
        notes.append(f"{service.name}: switch to {was}{_by(former)} dropped, the file {why}")
    if set(former.shares) <= set(service.pools):
        history = (*history, former)[-MAXIMUM_HISTORY:]
    return ServiceOverride(revision=present.revision + 1, configured=service.active, history=history)


def _by(change: Change | Shares) -> str:
    return f" by {change.who}" if change.who else ""
