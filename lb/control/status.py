"""What `GET /v1/status` tells."""

from __future__ import annotations

import time

from lb.control.controller import Controller
from lb.core.admin import BackendStatus, NameStatus, PoolStatus, RelayStatus, ServiceStatus, Status
from lb.core.compose import Record
from lb.core.overrides import Change, Overrides, shares_of
from lb.core.standing import Administrative, Standing
from lb.core.table import Endpoint, Route
from lb.page import CONNECT_NANOSECONDS, CURRENT, FAILED, RECEIVED_BYTES, RESET, SENT_BYTES, TOTAL

REMOVED = "removed"
"""In place of an administrative state: it is configured no more, and goes with its last connection."""


def status_of(controller: Controller) -> Status:
    table = controller.table
    services = {}
    for service in controller.balancer.services:
        route = table.routes[service.name]
        services[service.name] = ServiceStatus(
            listen=service.listen,
            algorithm=service.algorithm,
            revision=route.revision,
            pools=_pools(controller, route),
            tls=route.tls,
            routes=route.hello_routes,
        )
    relays = tuple(
        RelayStatus(
            pid=peer.pid,
            generation=peer.generation,
            slot=peer.slot,
            is_draining=peer.is_draining,
            taken=peer.taken,
        )
        for peer in controller.relays.connected
    )
    return Status(
        name=controller.balancer.name,
        generation=table.generation,
        revision=table.revision,
        is_durable=controller.store.problem is None,
        services=services,
        relays=relays,
        names=_names(controller),
        file=controller.file,
        unheard_peers=controller.unheard_peers,
    )


def _names(controller: Controller) -> dict[str, NameStatus]:
    now = time.monotonic()
    return {
        typed: NameStatus(
            addresses=answer.addresses,
            age_seconds=None if answer.at is None else now - answer.at,
            error=answer.error,
        )
        for typed, answer in sorted(controller.answers.items())
    }


def unknown_names(controller: Controller) -> dict[str, tuple[str, ...]]:
    """Services that have nothing but names without an address in the pools that get connections, or in one that a route
    leads to; which ones."""
    found: dict[str, tuple[str, ...]] = {}
    for service in controller.balancer.services:
        shared = {pool for pool, share in shares_of(service, controller.overrides).items() if share}
        for pools in (shared, *({pool} for pool in sorted(service.routed_pools))):
            members = [one for one in controller.present.values() if one.service == service.name and one.pool in pools]
            if members and not any(one.is_known for one in members):
                names = (*found.get(service.name, ()), *(one.typed for one in members))
                found[service.name] = tuple(dict.fromkeys(names))
    return found


def _pools(controller: Controller, route: Route) -> dict[str, PoolStatus]:
    pools = {}
    routed = {one.pool for one in route.hello_routes}
    for pool, endpoints in route.pools.items():
        backends = {}
        for one in endpoints:
            # A name that is there twice: what is leaving gives way to its successor.
            name = one.identity if one.name in backends or _is_shadowed(one, endpoints, controller) else one.name
            backends[name] = _backend(controller, one)
        pools[pool] = PoolStatus(percent=route.shares.get(pool, 0), is_routed=pool in routed, backends=backends)
    return pools


def _is_shadowed(one: Endpoint, endpoints: tuple[Endpoint, ...], controller: Controller) -> bool:
    return one.identity in controller.leaving and sum(other.name == one.name for other in endpoints) > 1


def _backend(controller: Controller, one: Endpoint) -> BackendStatus:
    record = controller.records.get(one.identity, Record())
    present = controller.present.get(one.identity)
    standing = present.standing if present is not None else Standing(Administrative.DRAIN)
    service = controller.service(present.service) if present is not None else None
    has_agent = service is not None and service.agent_check is not None
    sums = controller.page.sums(one.identity)
    return BackendStatus(
        name=one.name,
        address=one.address,
        identity=one.identity,
        administrative=REMOVED if present is None else standing.administrative.value,
        health=standing.health.value,
        is_ejected=standing.is_ejected,
        is_eligible=one.is_eligible,
        weight=one.weight,
        backup=one.backup,
        maxconn=one.maxconn,
        connections=sums[CURRENT],
        total=sums[TOTAL],
        failed=sums[FAILED],
        reset=sums[RESET],
        sent_bytes=sums[SENT_BYTES],
        received_bytes=sums[RECEIVED_BYTES],
        connect_seconds=sums[CONNECT_NANOSECONDS] / 1e9,
        last_check=record.last_check,
        agent=_agent(record) if has_agent else "",
        since_seconds=time.monotonic() - record.since if record.since else 0.0,
        override=_override(controller.overrides, present.key) if present is not None else "",
    )


def _agent(record: Record) -> str:
    said = str(record.said) if record.said is not None else ""
    problem = f"no answer: {record.last_agent}" if record.last_agent else ""
    return "; ".join(one for one in (said, problem) if one)


def _override(overrides: Overrides, key: str) -> str:
    shown = []
    if (state := overrides.states.get(key)) is not None:
        shown.append(_told(state.state, state))
    if (weight := overrides.weights.get(key)) is not None:
        shown.append(_told(f"weight {weight.weight}", weight))
    if (added := overrides.added.get(key)) is not None:
        shown.append(_told("added", added))
    return "; ".join(shown)


def _told(what: str, change: Change) -> str:
    by = f" by {change.who}" if change.who else ""
    return f"{what}{by}: {change.why}" if change.why else f"{what}{by}"
