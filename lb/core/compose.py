"""The table, made of the three layers: what is configured, what people changed, what was observed. No I/O."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from lb.core.agent import Said, maxconn_of, weight_of
from lb.core.ejection import is_panic
from lb.core.model import Backend, Balancer, Service
from lb.core.naming import Answer, is_called_by_name
from lb.core.overrides import Overrides, identity_of, key_of, pools_of, revision_of, shares_of
from lb.core.standing import Administrative, CheckedHealth, Health, Standing
from lb.core.table import Closing, Endpoint, Route, Table


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What was observed of one backend. Times are monotonic."""

    checked: CheckedHealth = CheckedHealth()
    last_check: str = ""
    said: Said | None = None
    """By its agent, in all that it has answered; None: it never has."""
    last_agent: str = ""
    """Why the agent's latest answer is missing; empty: it is not."""
    up_since: float | None = None
    """When it became eligible; None: it was from the start."""
    standing: Standing | None = None
    since: float = 0.0
    """From when on it has been standing so."""


class Leaving(msgspec.Struct, frozen=True, kw_only=True):
    """A backend that is configured no more, and has connections still."""

    service: str
    pool: str
    endpoint: Endpoint


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    records: Mapping[str, Record] = {}
    """By identity."""
    ejected: Collection[str] = frozenset()
    leaving: Mapping[str, Leaving] = {}
    answers: Mapping[str, Answer] = {}
    """Of backends called by a name: what it stands for. One that is not in it was never asked for."""


class Present(msgspec.Struct, frozen=True, kw_only=True):
    """One backend as it stands."""

    service: str
    pool: str
    identity: str
    backend: Backend
    """With one address that its name stands for, and the weight and maxconn it is given."""
    standing: Standing
    closing: Closing | None
    weight: float
    typed: str
    """Its address as it is configured: a name, perhaps."""
    is_known: bool = True
    """It has an address. A name that has never been answered stands for a backend that is none yet."""
    is_asked: bool = True
    """Its name may be answered for the first time, any moment."""

    @property
    def key(self) -> str:
        """All addresses of a name have the same: what people change, they change for all of them."""
        return key_of(self.service, self.pool, self.backend.name)

    @property
    def shown(self) -> str:
        """Its name in the pool, its own there."""
        is_one_of_many = self.is_known and self.typed != self.backend.address
        return f"{self.backend.name}@{self.backend.address}" if is_one_of_many else self.backend.name


def present_backends(
    balancer: Balancer, overrides: Overrides, observed: Observed, wall_offset: float
) -> dict[str, Present]:
    """All that are configured or were added, by identity. `wall_offset`: the wall clock less the monotonic one."""
    return {
        one.identity: one
        for service in balancer.services
        for pool, backends in pools_of(service, overrides).items()
        for backend in backends
        for address in _addresses(backend, observed)
        for one in (_present(service, pool, backend, address, overrides, observed, wall_offset),)
    }


def compose(
    balancer: Balancer,
    overrides: Overrides,
    observed: Observed,
    *,
    generation: int,
    revision: int,
    wall_offset: float,
) -> Table:
    """Equal layers make equal tables."""
    members: dict[tuple[str, str], list[Present]] = {}
    for one in present_backends(balancer, overrides, observed, wall_offset).values():
        members.setdefault((one.service, one.pool), []).append(one)
    routes = {}
    for service in balancer.services:
        pools = {}
        for pool in service.pools:
            inside = members.get((service.name, pool), [])
            has_panic = _has_panic(inside, service.panic_percent)
            pools[pool] = tuple(_endpoint(one, service, observed, has_panic) for one in inside)
        for leaving in observed.leaving.values():
            if leaving.service == service.name:
                pools[leaving.pool] = (*pools.get(leaving.pool, ()), leaving.endpoint)
        routes[service.name] = _route(service, overrides, pools)
    return Table(generation=generation, revision=revision, routes=routes)


def recorded(record: Record | None, standing: Standing, now: float, *, is_start: bool) -> Record:
    """The record of a backend that stands so now. `is_start`: it was there before anything was observed."""
    if record is None:
        return Record(standing=standing, since=now, up_since=now if standing.is_eligible and not is_start else None)
    if record.standing == standing:
        return record
    was_eligible = record.standing is not None and record.standing.is_eligible
    up_since = now if standing.is_eligible and not was_eligible else record.up_since
    checked = record.checked if standing.is_checked else CheckedHealth()  # who is in maintenance comes back unknown
    return msgspec.structs.replace(record, standing=standing, since=now, up_since=up_since, checked=checked)


def administrative_of(overrides: Overrides, key: str, said: Said | None = None) -> Administrative:
    """What people want; where they want nothing, what the agent wants."""
    change = overrides.states.get(key)
    if change is not None:
        return Administrative(change.state)
    return (said.administrative if said is not None else None) or Administrative.READY


def _addresses(backend: Backend, observed: Observed) -> tuple[str, ...]:
    """A name stands for as many backends as it has addresses; before its first answer for one that is none yet."""
    if not is_called_by_name(backend.address):
        return (backend.address,)
    return observed.answers.get(backend.address, Answer()).addresses or (backend.address,)


def _present(
    service: Service,
    pool: str,
    backend: Backend,
    address: str,
    overrides: Overrides,
    observed: Observed,
    wall_offset: float,
) -> Present:
    key = key_of(service.name, pool, backend.name)
    identity = identity_of(overrides, service.name, pool, backend.name, address)
    record = observed.records.get(identity, Record())
    said = record.said if service.agent_check is not None else None
    weight = overrides.weights.get(key)
    is_known = not is_called_by_name(address)
    health = _health(service, record, said) if is_known else Health.UNKNOWN
    return Present(
        service=service.name,
        pool=pool,
        identity=identity,
        backend=msgspec.structs.replace(backend, address=address, maxconn=maxconn_of(backend.maxconn, said)),
        standing=Standing(administrative_of(overrides, key, said), health, identity in observed.ejected),
        closing=_closing(service, pool, key, overrides, wall_offset),
        weight=weight_of(backend.weight, said) if weight is None else float(weight.weight),
        typed=backend.address,
        is_known=is_known,
        is_asked=is_known or not observed.answers.get(address, Answer()).error,
    )


def _health(service: Service, record: Record, said: Said | None) -> Health:
    """An agent can bring down what passes its checks, and not bring up what fails them."""
    if said is not None and said.health is Health.DOWN:
        return Health.DOWN
    if service.health_check is not None:
        return record.checked.health
    return Health.UNKNOWN if service.check is not None and said is None else Health.UP


def _closing(service: Service, pool: str, key: str, overrides: Overrides, wall_offset: float) -> Closing | None:
    change = overrides.states.get(key)
    if change is not None and change.state == "maint":
        return Closing(at=change.at - wall_offset)
    override = overrides.services.get(service.name)
    ends = [] if change is None or change.closing_at is None else [change.closing_at]
    if override is not None and pool in override.closing and pool not in service.routed_pools:
        ends.append(override.closing[pool])
    return Closing(at=min(ends) - wall_offset, spread_seconds=service.timeouts.spread_seconds) if ends else None


def _has_panic(members: list[Present], percent: int) -> bool:
    """Too few of those that are wanted are up. Not while some were never checked, and not while a backup is up."""
    wanted = [one for one in members if one.standing.administrative is Administrative.READY and one.is_known]
    if any(
        one.standing.health is Health.UNKNOWN or (one.backend.backup and one.standing.is_eligible) for one in wanted
    ):
        return False
    eligible = {one.identity: one.standing.is_eligible for one in wanted if not one.backend.backup}
    return is_panic(eligible, percent / 100)


def _endpoint(one: Present, service: Service, observed: Observed, has_panic: bool) -> Endpoint:
    standing = one.standing
    is_wanted = standing.administrative is Administrative.READY
    is_unknown = standing.health is Health.UNKNOWN and one.is_asked
    record = observed.records.get(one.identity)
    return Endpoint(
        identity=one.identity,
        name=one.shown,
        address=one.backend.address,
        weight=one.weight,
        maxconn=one.backend.maxconn,
        backup=one.backend.backup,
        is_eligible=standing.is_eligible or (has_panic and is_wanted and one.is_known),
        is_awaited=is_wanted and is_unknown and not standing.is_ejected,
        up_since=record.up_since if record is not None and service.slow_start_seconds else None,
        closing=one.closing,
    )


def _route(service: Service, overrides: Overrides, pools: dict[str, tuple[Endpoint, ...]]) -> Route:
    return Route(
        service=service.name,
        revision=revision_of(service.name, overrides),
        shares=dict(shares_of(service, overrides)),
        pools=pools,
        algorithm=service.algorithm,
        send_proxy=service.send_proxy,
        accept_proxy=service.accept_proxy,
        proxy_from=service.proxy_from,
        tls=service.tls,
        hello_routes=service.routes,
        maximum_queue=service.maximum_queue,
        per_source=service.per_source,
        slow_start_seconds=service.slow_start_seconds,
        timeouts=service.timeouts,
    )
