"""Taking one step: on a host, at a balancer, or here; and what was seen of it."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

import msgspec

from handoff.errors import ExitCode, HandoffError
from lb.core.admin import Answer, Drain, Prepare, Ready, ServiceStatus, Switch, Verify
from lb.core.rollout.budget import over_budget
from lb.core.rollout.gates import Counts, compared, refusals
from lb.core.rollout.plan import ON_HOSTS, Kind, Step
from lb.core.rollout.progress import Records, Run, past, revision_at
from lb.core.rollout.undo import versioned_hosts
from lb.rollout.fleet import Fleet, active_pool, find_backend
from lb.rollout.local import command_here, probe
from lb.rollout.stores.base import Fenced
from lb.rollout.transport import Unfinished, repeatedly

POLL_SECONDS = 0.5
GRACE_SECONDS = 15.0
"""Beyond a wait that happens elsewhere, for the answer to come."""


class Outcome(NamedTuple):
    """`output`: what a command printed; shown, never kept. `is_overtaken`: somebody else has switched."""

    is_good: bool
    note: str = ""
    revision: int | None = None
    output: str = ""
    is_overtaken: bool = False


class Actions:
    """Of one run. Every one may be taken again: it finds out what was done, or nothing is done twice."""

    def __init__(self, fleet: Fleet, token: int, sleep: Callable[[float], Awaitable[None]]) -> None:
        """`sleep`: raises where the run is to stop."""
        self._fleet = fleet
        self._token = token
        self._sleep = sleep

    async def take(self, step: Step, run: Run, records: Records) -> Outcome:
        """What went wrong is an outcome; raises only what ends the run."""
        try:
            return await self._take(step, run, records)
        except HandoffError as error:
            if error.exit_code is ExitCode.ABORTED:  # a host, or a balancer, has seen a higher token
                raise Fenced(error.message) from None
            return Outcome(False, f"{step.host or step.balancer or 'here'}: {error.message}")
        except TimeoutError:
            return Outcome(False, f"{step.host or step.balancer or 'here'}: no answer within {step.seconds:g} s")

    async def _take(self, step: Step, run: Run, records: Records) -> Outcome:
        if step.kind in ON_HOSTS:
            return await self._command(step, run)
        match step.kind:
            case Kind.HOOK:
                return await self._hook(step, run)
            case Kind.BUDGET:
                return await self._until(step, lambda: self._over_budget(step, run))
            case Kind.DRAIN | Kind.READY | Kind.HEALTHY | Kind.PREPARE:
                return await repeatedly(lambda: self._ask(step, run), self._sleep)
            case Kind.SWITCH:
                return await repeatedly(lambda: self._switch(step, run, records), self._sleep)
            case Kind.BAKE:
                return await self._bake(step, run, records)
            case Kind.KEEP:
                await self._sleep(step.seconds)  # whole, whoever goes on with it: nothing counts on the clocks of two
                return _unused(step, await self._fleet.statuses(run.balancers))
            case _:
                raise AssertionError(step.kind)

    # --- on hosts, and here -----------------------------------------------------------------------------------------

    async def _command(self, step: Step, run: Run) -> Outcome:
        host = self._fleet.deploy.host(step.host)
        operation = f"{run.id}.{step.id}" + (f".{run.attempt}" if run.attempt > 1 else "")
        transport = self._fleet.transport(host)
        service = self._fleet.deploy.service
        try:
            done = await transport.execute(service, self._token, operation, step.command, step.seconds)
        except Unfinished:
            done = await transport.stop(service, self._token, operation, GRACE_SECONDS)
            note = f"{step.host}: {step.kind.value} was ended after {step.seconds:g} s (operation {operation})"
            return Outcome(False, note, output=done.output)
        if done.exit_code == 0:
            return Outcome(True)
        note = f"{step.host}: {step.kind.value} exited with status {done.exit_code} (operation {operation})"
        return Outcome(False, note, output=done.output)

    async def _hook(self, step: Step, run: Run) -> Outcome:
        code, output = await command_here(step.command, hook_environment(run, self._token), step.seconds)
        return Outcome(code == 0, "" if code == 0 else f"{step.id}: exited with status {code}", output=output)

    # --- at balancers -----------------------------------------------------------------------------------------------

    async def _ask(self, step: Step, run: Run) -> Outcome:
        common: dict[str, object] = {"who": f"rollout {run.id}", "why": f"{run.kind} {run.version}", **self._fence}
        server = self._fleet.deploy.host(step.host).server if step.host else None
        request: Drain | Ready | Verify | Prepare
        match step.kind:
            case Kind.DRAIN:
                assert server is not None
                wait = step.seconds + GRACE_SECONDS
                request = Drain(server=server, wait_seconds=wait, deadline_seconds=step.seconds, **common)  # type: ignore[arg-type]
            case Kind.READY:
                assert server is not None
                request = Ready(server=server, wait_seconds=step.seconds, is_afresh=True, **common)  # type: ignore[arg-type]
            case Kind.HEALTHY:
                assert server is not None
                request = Verify(server=server, wait_seconds=step.seconds, **common)  # type: ignore[arg-type]
            case _:
                service = self._fleet.deploy.service
                is_back = _leads_back(run)
                common |= {"wait_seconds": step.seconds, "is_afresh": step.seconds > 0 and not is_back}
                common["is_partial_enough"] = is_back
                request = Prepare(service=service, pool=step.pool, **common)  # type: ignore[arg-type]
        answer = await self._fleet.balancer(step.balancer).ask(request, step.seconds + 2 * GRACE_SECONDS)
        return _outcome(step, answer)

    @property
    def _fence(self) -> dict[str, object]:
        return {"fence": f"deploy/{self._fleet.deploy.service}", "token": self._token}

    async def _switch(self, step: Step, run: Run, records: Records) -> Outcome:
        """By the revision that was prepared; on the way back by the one that our own switch has made, if it did. What
        counts is what the balancer shows then."""
        status = await self._status(step)
        if _has_switched(status, step):
            if run.back is not None:  # a switch of ours may still be on its way: from now on its token is too old
                await self._ask(msgspec.structs.replace(step, kind=Kind.PREPARE, seconds=0.0), run)
                status = await self._status(step)
            if _has_switched(status, step):
                return Outcome(True, revision=status.revision)
        known = revision_at(run, records, step.balancer)
        if known is not None and run.back is not None and status.revision == known + 1:
            known += 1  # a switch of ours whose answer was lost
        answer = await self._fleet.balancer(step.balancer).ask(
            Switch(
                service=self._fleet.deploy.service,
                pool=step.pool,
                percent=step.percent,
                revision=known if known is not None else status.revision,
                is_partial_enough=_leads_back(run),
                wait_seconds=step.seconds,
                who=f"rollout {run.id}",
                why=f"{run.kind} {run.version}",
                **self._fence,  # type: ignore[arg-type]
            ),
            step.seconds + GRACE_SECONDS,
        )
        return _seen(step, _outcome(step, answer), await self._status(step), known)

    async def _status(self, step: Step) -> ServiceStatus:
        return await self._fleet.status_once(step.balancer)

    async def _over_budget(self, step: Step, run: Run) -> str | None:
        statuses = await self._fleet.statuses(run.balancers)
        return over_budget(self._fleet.deploy, step.hosts, self._fleet.down(statuses))

    async def _until(self, step: Step, look: Callable[[], Awaitable[str | None]]) -> Outcome:
        """Until there is nothing wrong any more, or the time is over."""
        deadline = time.monotonic() + step.seconds
        while True:
            wrong = await look()
            if wrong is None:
                return Outcome(True)
            if time.monotonic() >= deadline:
                return Outcome(False, f"{wrong} (after {step.seconds:g} s)")
            await self._sleep(POLL_SECONDS)

    def _sick(self, hosts: Iterable[str], statuses: dict[str, ServiceStatus]) -> str | None:
        """Who of them would get no connections; what an operator has put out is not for us to judge."""
        for name in hosts:
            for address, status in statuses.items():
                backend = find_backend(self._fleet.deploy.host(name), status)
                if backend is not None and not backend.is_eligible and backend.administrative == "ready":
                    return f"{name}: is {backend.health} on {address}: {backend.last_check or 'not checked yet'}"
        return None

    # --- watching ---------------------------------------------------------------------------------------------------

    async def _bake(self, step: Step, run: Run, records: Records) -> Outcome:
        """Health all the time, and the gates at the end."""
        names = run.balancers if any(self._fleet.deploy.host(one).server for one in step.hosts) else ()
        old = [
            one.name
            for one in self._fleet.deploy.hosts
            if one.name not in {*step.hosts, *versioned_hosts(run.plan, past(records))}
        ]
        deadline = time.monotonic() + step.seconds
        first = statuses = await self._fleet.statuses(names)
        while (left := deadline - time.monotonic()) > 0:
            sick = self._sick(step.hosts, statuses) or _astray(step, statuses)
            if sick is not None:
                return Outcome(False, sick)
            await self._sleep(min(left, POLL_SECONDS))
            statuses = await self._fleet.statuses(names)

        def grown(hosts: Iterable[str]) -> Counts:
            return self._fleet.counts(statuses, list(hosts)) - self._fleet.counts(first, list(hosts))

        before = self._fleet.counts(first, old)
        found = refusals(run.deploy.gate, grown(step.hosts), compared(run.deploy.gate, grown(old), before))
        found += await self._asked(run, step)
        sick = self._sick(step.hosts, statuses) or _astray(step, statuses)
        return Outcome(not found and sick is None, "; ".join([*found, *([sick] if sick else [])]))

    async def _asked(self, run: Run, step: Step) -> list[str]:
        gate, found = run.deploy.gate, []
        if gate.command is not None:
            environment = {**hook_environment(run, self._token), "HANDOFF_HOSTS": " ".join(step.hosts)}
            code, _ = await command_here(gate.command, environment, run.deploy.step_timeout_seconds)
            if code != 0:
                found.append(f"the gate's command exited with status {code}")
        if gate.probe is not None and (wrong := await probe(gate.probe)) is not None:
            found.append(f"the gate's probe {gate.probe}: {wrong}")
        return found


def hook_environment(run: Run, token: int) -> dict[str, str]:
    """For commands on the deployer's machine."""
    return {
        **os.environ,
        "HANDOFF_ROLLOUT": run.id,
        "HANDOFF_SERVICE": run.deploy.service,
        "HANDOFF_VERSION": run.version,
        "HANDOFF_TOKEN": str(token),
        "HANDOFF_VERDICT": run.verdict.value if run.verdict is not None else "",
    }


def _leads_back(run: Run) -> bool:
    """To a pool that was good before: that one of it has died meanwhile must not hold up who wants to leave the new."""
    return run.back is not None or run.kind == "rollback"


def _has_switched(status: ServiceStatus, step: Step) -> bool:
    if step.percent == 100:
        return active_pool(status) == step.pool
    return step.pool in status.pools and status.pools[step.pool].percent == step.percent


def _astray(step: Step, statuses: dict[str, ServiceStatus]) -> str | None:
    """A balancer that somebody else has switched while the pool is watched, or that has forgotten it."""
    wrong = [address for address, status in statuses.items() if step.pool and not _has_switched(status, step)]
    return f"{', '.join(wrong)}: new connections are not divided any more as this rollout has it" if wrong else None


def _unused(step: Step, statuses: dict[str, ServiceStatus]) -> Outcome:
    """Somebody may have switched back while the old pool was kept."""
    found = [
        address
        for address, status in statuses.items()
        if step.pool in status.pools and (status.pools[step.pool].percent or status.pools[step.pool].is_routed)
    ]
    return Outcome(not found, f"{step.pool} gets connections from {', '.join(found)}: it is kept" if found else "")


def _seen(step: Step, outcome: Outcome, status: ServiceStatus, known: int | None) -> Outcome:
    """Of a switch: what the balancer shows counts, whatever it said. A question of ours that was thought lost may have
    come first; where somebody else's switch did, none of ours can be taken any more."""
    if _has_switched(status, step):
        return Outcome(True, revision=status.revision)
    if outcome.is_good:
        return Outcome(False, f"{step.balancer}: says that it has switched to {step.pool}, and shows that it has not")
    return outcome._replace(is_overtaken=known is not None and status.revision != known)


def _outcome(step: Step, answer: Answer) -> Outcome:
    where = " on ".join(one for one in (step.host, step.balancer) if one)
    if answer.exit_code == ExitCode.ABORTED:
        raise Fenced(f"{step.balancer}: {answer.message}")
    if answer.exit_code == ExitCode.DONE:
        return Outcome(True, revision=answer.revision)
    return Outcome(False, f"{where}: {answer.message}")
