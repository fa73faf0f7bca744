"""Switches from pool to pool, and back: compare and swap of a service's revision."""

from __future__ import annotations

import time

import msgspec

from lb.control.confirming import confirm
from lb.control.controller import Controller
from lb.core.admin import Answer, Prepare, Rollback, Switch
from lb.core.compose import Present
from lb.core.desired import shares_with
from lb.core.lookup import REFUSED, TIMED_OUT, USAGE, Refusal, check_pool, find_service
from lb.core.model import Service
from lb.core.overrides import Shares, revision_of, shares_of, with_shares
from lb.core.standing import Administrative

TAKEN_SECONDS = 10.0
"""For relay workers to take a table: a turn of their loops."""


async def switch(controller: Controller, request: Switch) -> Answer:
    """Raises Refusal. Answers when every relay worker goes by it."""
    if not 1 <= request.percent <= 100:
        raise Refusal(USAGE, f"percent {request.percent}: expected a whole number from 1 to 100")
    if request.drain_old and request.percent != 100:
        raise Refusal(USAGE, "drain-old: goes with 100 percent only; the old pool gets connections still")
    _check_revision(controller, find_service(controller.balancer, request.service), request.revision)
    check_pool(find_service(controller.balancer, request.service), request.pool)
    await _wait_healthy(controller, request, request.wait_seconds)
    service = find_service(controller.balancer, request.service)
    check_pool(service, request.pool)
    _check_revision(controller, service, request.revision)
    _refuse_unhealthy(controller, request)
    present = shares_of(service, controller.overrides)
    shares = _shares(service, present, request.pool, request.percent)
    if shares == present and not request.drain_old:
        done = f"{service.name}: {_shown(shares)} already"
        return Answer(exit_code=0, message=done, revision=revision_of(service.name, controller.overrides))
    closing, notes = _closing(controller, service, shares, request)
    return await _take(controller, service, shares, request, closing, notes)


async def prepare(controller: Controller, request: Prepare) -> Answer:
    """Raises Refusal as a switch would."""
    check_pool(find_service(controller.balancer, request.service), request.pool)
    _check_revision(controller, find_service(controller.balancer, request.service), request.revision)
    deadline = time.monotonic() + request.wait_seconds
    if request.is_afresh:
        missing = await confirm(controller, lambda one: _is_wanted(one, request), request.wait_seconds)
        if missing:
            raise Refusal(REFUSED, f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}; nothing changed")
    await _wait_healthy(controller, request, deadline - time.monotonic())
    service = find_service(controller.balancer, request.service)
    check_pool(service, request.pool)
    _check_revision(controller, service, request.revision)
    _refuse_unhealthy(controller, request)
    revision = revision_of(service.name, controller.overrides)
    return Answer(
        exit_code=0, message=f"{service.name}/{request.pool} is healthy at revision {revision}", revision=revision
    )


def _is_wanted(one: Present, request: Prepare) -> bool:
    is_member = (one.service, one.pool) == (request.service, request.pool)
    return is_member and one.standing.administrative is Administrative.READY


async def rollback(controller: Controller, request: Rollback) -> Answer:
    """Raises Refusal. A pool that is not what it was is good enough, if somebody there is up."""
    service = find_service(controller.balancer, request.service)

    def former() -> Shares | None:
        override = controller.overrides.services.get(request.service)
        return override.history[-1] if override is not None and override.history else None

    def is_possible() -> bool:
        shares = former()
        return shares is not None and all(_is_any_eligible(controller, service.name, pool) for pool in shares.shares)

    if former() is not None:
        await controller.wait_for(is_possible, request.wait_seconds)
    service = find_service(controller.balancer, request.service)
    before = former()
    if before is None:
        raise Refusal(REFUSED, f"{service.name}: there is no previous revision; nothing changed")
    if not is_possible():
        raise Refusal(REFUSED, f"{service.name}: nobody is up in {' or '.join(before.shares)}; nothing changed")
    return await _take(controller, service, dict(before.shares), request, {}, ())


async def published(controller: Controller, revision: int, done: str) -> Answer:
    """Done, once every relay worker goes by this table."""
    if await controller.all_taken(revision, TAKEN_SECONDS):
        return Answer(exit_code=0, message=done)
    pids = ", ".join(map(str, controller.behind(revision))) or "some"
    problem = f"{done}, but not everywhere after {TAKEN_SECONDS:g} s: relay workers {pids} have not taken it"
    return Answer(exit_code=TIMED_OUT, message=problem)


async def _take(
    controller: Controller,
    service: Service,
    shares: dict[str, int],
    request: Switch | Rollback,
    closing: dict[str, float],
    notes: tuple[str, ...],
) -> Answer:
    taken = Shares(shares=shares, who=request.who, why=request.why, at=controller.wall())
    overrides = with_shares(controller.overrides, service, taken, closing)
    revision = revision_of(service.name, overrides)
    done = f"{service.name}: {_shown(shares)}, revision {revision}"
    answer = await published(controller, controller.override(overrides), done)
    return msgspec.structs.replace(answer, notes=notes, revision=revision)


def _check_revision(controller: Controller, service: Service, expected: int | None) -> None:
    present = revision_of(service.name, controller.overrides)
    if expected is not None and expected != present:
        raise Refusal(REFUSED, f"{service.name} is at revision {present} by now, not {expected}; nothing changed")


def _is_healthy(controller: Controller, request: Switch | Prepare) -> bool:
    if request.is_partial_enough and _is_any_eligible(controller, request.service, request.pool):
        return True
    return not _problems(controller, request.service, request.pool)


async def _wait_healthy(controller: Controller, request: Switch | Prepare, seconds: float) -> None:
    if seconds > 0:
        await controller.wait_for(lambda: _is_healthy(controller, request), seconds)


def _refuse_unhealthy(controller: Controller, request: Switch | Prepare) -> None:
    if not _is_healthy(controller, request):
        problems = _problems(controller, request.service, request.pool)
        shown = ", ".join(problems[:5]) + (" …" if len(problems) > 5 else "")
        raise Refusal(REFUSED, f"{request.service}/{request.pool} is not healthy ({shown}); nothing changed")


def _problems(controller: Controller, service: str, pool: str) -> list[str]:
    """Why connections should not go there: every backend that is wanted is to be up."""
    members = [one for one in controller.present.values() if (one.service, one.pool) == (service, pool)]
    wanted = [one for one in members if one.standing.administrative is Administrative.READY]
    if not wanted:
        return ["it has no backends" if not members else "all its backends are drained"]
    if not any(one.weight for one in wanted):
        return ["all its backends have weight 0"]
    return [
        f"{one.backend.name} is {'ejected' if one.standing.is_ejected else one.standing.health.value}"
        for one in wanted
        if not one.standing.is_eligible
    ]


def _is_any_eligible(controller: Controller, service: str, pool: str) -> bool:
    return any(
        one.standing.is_eligible and one.weight > 0
        for one in controller.present.values()
        if (one.service, one.pool) == (service, pool)
    )


def _shares(service: Service, present: dict[str, int], pool: str, percent: int) -> dict[str, int]:
    if percent < 100 and not {name for name in present if name != pool}:
        raise Refusal(REFUSED, f"{service.name}: {pool} has all new connections already; switch to the other pool")
    return shares_with(service, present, pool, percent)


def _closing(
    controller: Controller, service: Service, shares: dict[str, int], request: Switch
) -> tuple[dict[str, float], tuple[str, ...]]:
    """From when on pools are closed that get nothing any more; and what there is to say."""
    if not request.drain_old:
        return {}, ()
    left = [pool for pool in service.pools if pool not in shares]
    routed = [pool for pool in left if pool in service.routed_pools]
    notes = tuple(f"{pool} is not drained: a route leads to it" for pool in routed)
    seconds = service.timeouts.drain_seconds if request.deadline_seconds is None else request.deadline_seconds
    if seconds is None:
        return {}, ("no deadline: what the old pool has goes on; give one, or set drain in [service.timeouts]", *notes)
    return {pool: controller.wall() + seconds for pool in left if pool not in routed}, notes


def _shown(shares: dict[str, int]) -> str:
    return ", ".join(f"{pool} gets {share} % of new connections" for pool, share in shares.items())
