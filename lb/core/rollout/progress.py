"""A run and its records: what comes next. Whoever has read them decides the same, on any machine."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping

import msgspec

from handoff.errors import ExitCode
from lb.core.rollout.model import Deploy
from lb.core.rollout.plan import CHANGING, ON_HOSTS, VERSIONED, Group, Kind, Plan, Seen, Step
from lb.core.rollout.undo import Past, lost_hosts, undo


class Verdict(enum.Enum):
    """Of a run; each ends in exactly one."""

    COMMITTED = "committed"
    ROLLED_BACK = "rolled back"
    ABORTED = "aborted"
    PARTIAL = "partial"

    @property
    def exit_code(self) -> ExitCode:
        return _EXIT_CODES[self]


_EXIT_CODES = {
    Verdict.COMMITTED: ExitCode.DONE,
    Verdict.ROLLED_BACK: ExitCode.ROLLED_BACK,
    Verdict.ABORTED: ExitCode.ABORTED,
    Verdict.PARTIAL: ExitCode.PARTIAL,
}


class State(enum.Enum):
    """Of a step, as it is journalled: before it is taken, and when its outcome was observed."""

    BEGUN = "begun"
    DONE = "done"
    FAILED = "failed"


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Of one step."""

    step: str
    state: State
    attempt: int = 1
    at: float
    """Seconds since 1970, for people."""
    note: str = ""
    """Why it failed, what was seen. Never what a command printed."""
    revision: int | None = None
    """Of the service at a balancer, behind the step."""
    is_overtaken: bool = False
    """Somebody else has switched the balancer: nothing of ours was changed there, nor can be."""


class Run(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One rollout. Its plan does not change; on the way back it has a second one."""

    id: str
    version: str
    deploy: Deploy
    plan: Plan
    seen: Seen
    who: str
    began_at: float
    """Seconds since 1970, for people."""
    kind: str = "deploy"
    """Or `rollback`, of a run that had been committed."""
    back: Plan | None = None
    """The way back, from the moment that is taken."""
    reason: str = ""
    """Of the way back."""
    is_aborted: bool = False
    attempt: int = 1
    """Of what failed before."""
    without: dict[str, str] = {}
    """Balancers that are left out, and by whom."""
    verdict: Verdict | None = None
    ended_at: float | None = None
    note: str = ""

    @property
    def balancers(self) -> tuple[str, ...]:
        return tuple(one for one in self.deploy.balancers if one not in self.without)


class Do(msgspec.Struct, frozen=True):
    """These steps, side by side."""

    title: str
    steps: tuple[Step, ...]


class TurnBack(msgspec.Struct, frozen=True):
    reason: str


class End(msgspec.Struct, frozen=True):
    verdict: Verdict
    note: str = ""


Next = Do | TurnBack | End
Records = Mapping[str, Record]


def what_next(run: Run, records: Records) -> Next:
    """From the journal alone."""
    if run.back is not None:
        return _on_the_way_back(run, run.back, records)
    for group in run.plan:
        steps = _wanted(run, group)
        failed = [one for one in steps if _has_failed(run, records, one)]
        missing = [one for one in steps if one not in failed and _state(records, one) is not State.DONE]
        if failed and not group.is_after_commit:
            missing = _unsettled(missing, records)
        if missing:
            return Do(group.title, tuple(missing))
        reason = "; ".join(records[one.id].note for one in failed)
        if failed and group.is_after_commit:
            return End(Verdict.COMMITTED, reason)
        if failed:
            return _failure(run, records, reason)
    return End(Verdict.COMMITTED)


def _failure(run: Run, records: Records, reason: str) -> Next:
    if run.deploy.on_failure == "stop" and run.deploy.strategy == "rolling":
        return End(Verdict.PARTIAL, f"stopped: {reason}; hosts with {run.version}: {_hosts_with_new(run, records)}")
    return TurnBack(reason)


def turned_back(run: Run, records: Records, reason: str, is_aborted: bool = False) -> Run:
    """The run on its way back; to be journalled before a step of it is taken."""
    way = undo(run.deploy, run.plan, past(records), run.seen, run.balancers)
    return msgspec.structs.replace(run, back=way, reason=reason, is_aborted=is_aborted)


def tried_again(run: Run) -> Run:
    """A run that ended as partial, stopped or on its way back, takes up what had failed."""
    return msgspec.structs.replace(run, attempt=run.attempt + 1, verdict=None, ended_at=None, note="")


def unsettled(run: Run, records: Records) -> Do | None:
    """What may still run on a host, as the deployer was killed: its end is waited for before anything leads back."""
    steps = [step for group in run.plan for step in _unsettled(_wanted(run, group), records)]
    return Do("what was begun", tuple(steps)) if steps else None


def _unsettled(steps: Iterable[Step], records: Records) -> list[Step]:
    return [one for one in steps if one.kind in ON_HOSTS and _state(records, one) is State.BEGUN]


def seen_again(run: Run, records: Records) -> dict[str, Record]:
    """Of a run that somebody takes up: who may be out of service is asked anew for hosts that are yet to change, and
    whether the old pool is out of use, where it is yet to be retired. Much may have happened since it was seen."""
    kept = dict(records)
    for way in (run.plan, run.back or ()):
        changing: set[str] = set()
        for group in reversed(way):
            for step in group.steps:
                if step.kind in CHANGING | {Kind.RETIRE} and _state(records, step) is not State.DONE:
                    changing.add(step.host)
                if (step.kind is Kind.BUDGET and changing & set(step.hosts)) or (step.kind is Kind.KEEP and changing):
                    kept.pop(step.id, None)
    return kept


def past(records: Records) -> Past:
    return Past(
        begun=frozenset(step for step, record in records.items() if not record.is_overtaken),
        done=frozenset(step for step, record in records.items() if record.state is State.DONE),
    )


def _on_the_way_back(run: Run, way: Plan, records: Records) -> Next:
    """What fails ends only the way of its own host, or balancer."""
    broken: dict[str, str] = {}
    for group in way:
        is_whole = not broken
        missing = []
        for step in _wanted(run, group):
            if _has_failed(run, records, step):
                for name in _whose(step):
                    broken.setdefault(name, records[step.id].note)
            elif _state(records, step) is State.DONE or broken.keys() & set(_whose(step)):
                continue
            elif is_whole or step.kind is not Kind.DISCARD:  # a balancer that does not answer may still lead there
                missing.append(step)
        if missing:
            return Do(group.title, tuple(missing))
    for name in lost_hosts(run.plan, past(records), run.seen) if run.deploy.strategy == "rolling" else ():
        broken[name] = f"{name}: keeps {run.version}: no previous version is known"
    if broken:
        return End(Verdict.PARTIAL, f"{run.reason}; and on the way back: {'; '.join(dict.fromkeys(broken.values()))}")
    return End(Verdict.ABORTED if run.is_aborted else Verdict.ROLLED_BACK, run.reason)


def _whose(step: Step) -> tuple[str, ...]:
    if step.host:
        return (step.host,)
    return step.hosts or (step.balancer,)


def _wanted(run: Run, group: Group) -> list[Step]:
    return [step for step in group.steps if step.balancer not in run.without]


def _has_failed(run: Run, records: Records, step: Step) -> bool:
    """In this attempt."""
    record = records.get(step.id)
    return record is not None and record.state is State.FAILED and record.attempt >= run.attempt


def _state(records: Records, step: Step) -> State | None:
    record = records.get(step.id)
    return None if record is None else record.state


def _hosts_with_new(run: Run, records: Records) -> str:
    done = past(records).done
    names = [step.host for group in run.plan for step in group.steps if step.kind is Kind.RELOAD and step.id in done]
    return ", ".join(names) or "none"


def revision_at(run: Run, records: Records, balancer: str) -> int | None:
    """Of the service there, behind our latest step at it."""
    found = None
    for group in (*run.plan, *(run.back or ())):
        for step in group.steps:
            record = records.get(step.id)
            if step.balancer == balancer and record is not None and record.revision is not None:
                found = record.revision
    return found


def versions_after(run: Run, records: Records) -> dict[str, str]:
    """Which version each host has, as far as the run's steps tell."""
    found: dict[str, str] = {}
    done = past(records).done
    for group in (*run.plan, *(run.back or ())):
        for step in group.steps:
            if step.kind in VERSIONED and step.id in done:
                found[step.host] = step.version
    return found


def how_far(run: Run, records: Records) -> tuple[int, int]:
    """Steps that are done, and all of them, on the way that it takes."""
    steps = [step for group in (run.plan if run.back is None else run.back) for step in _wanted(run, group)]
    return sum(_state(records, step) is State.DONE for step in steps), len(steps)


def can_turn_back(run: Run, records: Records) -> bool:
    """Not any more once the old pool is being retired."""
    return not any(step.kind is Kind.RETIRE and step.id in records for group in run.plan for step in group.steps)
