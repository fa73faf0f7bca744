"""What each request of the admin API does.

A change is made in one turn of the loop, so they come one after another; waiting for its effect blocks nobody.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from handoff.addresses import parse_bind
from handoff.errors import UsageError
from handoff.option_table import is_service_name
from lb.check_files import refuse_missing
from lb.config import MAXIMUM_BACKENDS, parse_config
from lb.control.confirming import confirm
from lb.control.controller import Controller
from lb.control.switching import prepare, published, rollback, switch
from lb.core.admin import (
    Add,
    Answer,
    Apply,
    Drain,
    Maint,
    Prepare,
    Ready,
    Remove,
    Request,
    Rollback,
    Switch,
    Verify,
    Weight,
)
from lb.core.choice import MAXIMUM_WEIGHT
from lb.core.compose import Present
from lb.core.lookup import FENCED, REFUSED, TIMED_OUT, UNKNOWN, USAGE, Found, Refusal, find_backend, find_pool, nearest
from lb.core.model import Backend
from lb.core.overrides import (
    Added,
    Removed,
    StateChange,
    WeightChange,
    fenced,
    key_of,
    pools_of,
    said_of,
    said_of_weight,
    without,
)
from lb.core.reloading import taken_in_place
from lb.core.standing import Administrative
from lb.own_addresses import IS_OWN

MAXIMUM_FENCE_LENGTH = 256
COUNT_SECONDS = 0.05
"""Between two looks at the connections that are left: they are counted in shared memory, which tells nobody."""

_LOG = logging.getLogger("handoff.lb")


class Commands:
    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def carry_out(self, request: Request) -> Answer:
        """Never raises for what was asked."""
        by = f" by {request.who}" if request.who else ""
        why = f": {request.why}" if request.why else ""
        try:
            self._fence(request)
            answer = await self._carry_out(request)
        except Refusal as refusal:
            answer = Answer(exit_code=refusal.exit_code, message=refusal.message)
        except UsageError as error:
            answer = Answer(exit_code=USAGE, message=error.message)
        problem = self._controller.store.problem
        if problem is not None:
            answer = msgspec.structs.replace(answer, notes=(*answer.notes, f"not durable: {problem}"))
        _LOG.info("%s%s%s: %s", type(request).__name__.lower(), by, why, answer.message)
        return answer

    def _fence(self, request: Request) -> None:
        """Raises Refusal for one of a rollout that has lost its lock."""
        if not request.fence:
            return
        if len(request.fence) > MAXIMUM_FENCE_LENGTH or not 0 < request.token < 2**63:
            raise Refusal(
                USAGE, f"token {request.token} of fence {request.fence[:80]!r}: expected a short name and a number"
            )
        overrides = self._controller.overrides
        known = fenced(overrides, request.fence, request.token)
        if known is None:
            highest = overrides.fences[request.fence]
            raise Refusal(
                FENCED,
                f"{request.fence}: token {request.token} is older than {highest}, which was seen; nothing changed",
            )
        if known is not overrides:
            self._controller.override(known)

    async def _carry_out(self, request: Request) -> Answer:
        match request:
            case Drain():
                return await self._drain(request)
            case Ready():
                return await self._ready(request)
            case Verify():
                return await self._verify(request)
            case Maint():
                return await self._maint(request)
            case Weight():
                return await self._weight(request)
            case Add():
                return await self._add(request)
            case Remove():
                return await self._remove(request)
            case Prepare():
                return await prepare(self._controller, request)
            case Switch():
                return await switch(self._controller, request)
            case Rollback():
                return await rollback(self._controller, request)
            case Apply():
                return await self._apply(request)

    # --- one backend ------------------------------------------------------------------------------------------------

    async def _drain(self, request: Drain) -> Answer:
        controller = self._controller
        found = self._find(request.server)
        seconds = request.deadline_seconds
        seconds = found.service.timeouts.drain_seconds if seconds is None else seconds
        now = controller.wall()
        present = controller.overrides.states.get(found.key)
        # A second drain does not begin anew: the deadline counts from the first one's start.
        at = present.at if present is not None and present.state == "drain" else now
        change = StateChange(
            who=request.who,
            why=request.why,
            at=at,
            until=_until(request.until_seconds),
            configured=found.backend.address,
            state="drain",
            closing_at=None if seconds is None else at + seconds,
        )
        answer = await self._set_state(found, change, "drains")
        return await self._emptied(found.key, answer, request.wait_seconds)

    async def _maint(self, request: Maint) -> Answer:
        found = self._find(request.server)
        change = StateChange(
            who=request.who,
            why=request.why,
            at=self._controller.wall(),
            until=_until(request.until_seconds),
            configured=found.backend.address,
            state="maint",
        )
        answer = await self._set_state(found, change, "is in maintenance")
        return await self._emptied(found.key, answer, request.wait_seconds)

    async def _set_state(self, found: Found, change: StateChange, what: str) -> Answer:
        overrides = self._controller.overrides
        changed = msgspec.structs.replace(overrides, states={**overrides.states, found.key: change})
        return await self._published(self._controller.override(changed), f"{found.key} {what}")

    async def _ready(self, request: Ready) -> Answer:
        controller = self._controller
        found = self._find(request.server)
        if request.is_afresh:
            missing = await confirm(controller, lambda one: one.key == found.key, request.wait_seconds)
            if missing:
                raise Refusal(TIMED_OUT, f"{', '.join(missing)}; nothing changed")
            found = self._find(request.server)
        overrides = controller.overrides
        states = without(overrides.states, found.key)
        if self._is_held_by_agent(found.key):
            states[found.key] = StateChange(
                who=request.who,
                why=request.why,
                at=controller.wall(),
                configured=found.backend.address,
                state="ready",
            )
        changed = msgspec.structs.replace(
            overrides,
            states=states,
            weights=without(overrides.weights, found.key),
        )
        answer = await self._published(controller.override(changed), f"{found.key} is ready")
        return await self._came_up(found.key, answer, request.wait_seconds)

    async def _verify(self, request: Verify) -> Answer:
        found = self._find(request.server)

        def is_judged(one: Present) -> bool:
            return one.key == found.key and one.standing.administrative is Administrative.READY

        missing = await confirm(self._controller, is_judged, request.wait_seconds)
        if missing:
            raise Refusal(TIMED_OUT, ", ".join(missing))
        return Answer(exit_code=0, message=f"{found.key} has passed a check, or is not judged")

    def _is_held_by_agent(self, key: str) -> bool:
        """It is `ready` against the agent's will then, which must be said, and kept."""
        records = self._controller.records
        said = [records[one.identity].said for one in self._controller.present.values() if one.key == key]
        return any(one is not None and one.administrative not in (None, Administrative.READY) for one in said)

    async def _weight(self, request: Weight) -> Answer:
        if not 0 <= request.weight <= MAXIMUM_WEIGHT:
            raise Refusal(USAGE, f"weight {request.weight}: expected a whole number from 0 to {MAXIMUM_WEIGHT}")
        controller = self._controller
        found = self._find(request.server)
        change = WeightChange(
            who=request.who,
            why=request.why,
            at=controller.wall(),
            configured=said_of_weight(found.backend),
            weight=request.weight,
        )
        overrides = controller.overrides
        changed = msgspec.structs.replace(overrides, weights={**overrides.weights, found.key: change})
        return await self._published(controller.override(changed), f"{found.key} has weight {request.weight}")

    # --- which backends ---------------------------------------------------------------------------------------------

    async def _add(self, request: Add) -> Answer:
        controller = self._controller
        await controller.listeners_known()
        service, pool = find_pool(controller.balancer, request.pool)
        backend = Backend(
            name=request.name,
            address=request.address,
            weight=request.weight,
            maxconn=request.maxconn,
            backup=request.backup,
        )
        members = pools_of(service, controller.overrides)[pool]
        self._check_new(backend, members)
        overrides = controller.overrides
        key = key_of(service.name, pool, backend.name)
        if key in overrides.removed and backend in service.pools[pool]:
            changed = msgspec.structs.replace(overrides, removed=without(overrides.removed, key))
        else:
            added = Added(who=request.who, why=request.why, at=controller.wall(), backend=backend)
            changed = msgspec.structs.replace(overrides, added={**overrides.added, key: added})
        answer = await self._published(controller.override(changed), f"{key} is added")
        return await self._came_up(key, answer, request.wait_seconds)

    def _check_new(self, backend: Backend, members: tuple[Backend, ...]) -> None:
        bind = parse_bind(backend.address)
        if bind.kind not in ("tcp", "unix") or bind.is_any_port or bind.name is not None:
            raise Refusal(USAGE, f"{backend.address}: expected HOST:PORT, [V6]:PORT or unix:PATH")
        if backend.name != backend.address and not is_service_name(backend.name):
            raise Refusal(USAGE, f"{backend.name}: is no name; expected up to 64 letters, digits and . _ -")
        if not 0 <= backend.weight <= MAXIMUM_WEIGHT:
            raise Refusal(USAGE, f"weight {backend.weight}: expected a whole number from 0 to {MAXIMUM_WEIGHT}")
        if backend.maxconn is not None and not 1 <= backend.maxconn <= 1_000_000:
            raise Refusal(USAGE, f"maxconn {backend.maxconn}: expected a whole number from 1 to 1000000")
        if any(one.name == backend.name for one in members):
            raise Refusal(REFUSED, f"{backend.name} is there already; nothing changed")
        if len(members) >= MAXIMUM_BACKENDS:
            raise Refusal(REFUSED, f"the pool has {len(members)} backends, the most there may be; nothing changed")
        if self._controller.is_own(backend.address):
            raise Refusal(USAGE, f"{backend.address} {IS_OWN}")

    async def _remove(self, request: Remove) -> Answer:
        controller = self._controller
        service, pool = find_pool(controller.balancer, request.pool)
        members = {one.name: one for one in pools_of(service, controller.overrides)[pool]}
        if request.name not in members:
            hint = nearest(request.name, members)
            raise Refusal(UNKNOWN, f"{request.pool} has no backend {request.name}{hint}")
        key = key_of(service.name, pool, request.name)
        identities = [one.identity for one in controller.present.values() if one.key == key]
        for identity in identities:
            controller.departure_seconds[identity] = request.deadline_seconds
        overrides = controller.overrides
        removed = dict(overrides.removed)
        configured = {one.name: one for one in service.pools[pool]}.get(request.name)
        if configured is not None and key not in removed:
            removed[key] = Removed(
                who=request.who, why=request.why, at=controller.wall(), configured=said_of(configured)
            )
        changed = msgspec.structs.replace(
            overrides,
            removed=removed,
            added=without(overrides.added, key),
            states=without(overrides.states, key),
            weights=without(overrides.weights, key),
        )
        answer = await self._published(controller.override(changed), f"{key} is removed")
        return await self._without_connections(identities, answer, request.wait_seconds)

    async def _apply(self, request: Apply) -> Answer:
        controller = self._controller
        await controller.listeners_known()
        wanted = parse_config(request.text, request.shown, near=".", bound=controller.relays.bound)
        refuse_missing(wanted, request.shown, ".")
        effective, notes = taken_in_place(controller.balancer, wanted)
        before = {service.name: service for service in controller.balancer.services}
        touched = [one.name for one in effective.services if one != before[one.name]]
        revision, dropped = controller.apply(effective)
        done = f"{request.shown} is applied: {', '.join(touched) or 'nothing'} changed"
        answer = await self._published(revision, done)
        return msgspec.structs.replace(answer, notes=(*notes, *dropped, *answer.notes))

    # --- within -----------------------------------------------------------------------------------------------------

    def _find(self, text: str) -> Found:
        return find_backend(self._controller.balancer, self._controller.overrides, text)

    async def _published(self, revision: int, done: str) -> Answer:
        return await published(self._controller, revision, done)

    async def _came_up(self, key: str, answer: Answer, wait_seconds: float | None) -> Answer:
        if answer.exit_code or wait_seconds is None:
            return answer

        def present() -> list[Present]:
            """A name has several."""
            return [one for one in self._controller.present.values() if one.key == key]

        def is_up() -> bool:
            return not present() or any(one.standing.is_eligible for one in present())

        if not await self._controller.wait_for(is_up, wait_seconds):
            health = present()[0].standing.health.value if present() else "gone"
            problem = f"{answer.message}, but it is {health} after {wait_seconds:g} s"
            return msgspec.structs.replace(answer, exit_code=TIMED_OUT, message=problem)
        if not present():
            return msgspec.structs.replace(answer, exit_code=UNKNOWN, message=f"{key} was removed meanwhile")
        # That it is up stands in a table, which they are to have.
        return await self._published(self._controller.publish(), f"{answer.message}, and up")

    async def _emptied(self, key: str, answer: Answer, wait_seconds: float | None) -> Answer:
        identities = [one.identity for one in self._controller.present.values() if one.key == key]
        return await self._without_connections(identities, answer, wait_seconds)

    async def _without_connections(self, identities: list[str], answer: Answer, wait_seconds: float | None) -> Answer:
        if answer.exit_code or wait_seconds is None:
            return answer

        def left() -> int:
            return sum(self._controller.connections(identity) for identity in identities)

        if await _until_counted(lambda: not left(), wait_seconds):
            return msgspec.structs.replace(answer, message=f"{answer.message}; no connection is left")
        problem = f"{answer.message}; {left()} connections are left after {wait_seconds:g} s"
        return msgspec.structs.replace(answer, exit_code=TIMED_OUT, message=problem)


def _until(seconds: float | None) -> float | None:
    """By the wall clock: it holds over a reboot."""
    return None if seconds is None else time.time() + seconds


async def _until_counted(is_done: Callable[[], bool], seconds: float) -> bool:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not is_done():
        left = deadline - loop.time()
        if left <= 0:
            return False
        await asyncio.sleep(min(COUNT_SECONDS, left))
    return True
