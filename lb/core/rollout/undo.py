"""What is done to go back: only where something was touched."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from lb.core.rollout.model import Deploy
from lb.core.rollout.plan import CHANGING, VERSIONED, Group, Kind, Plan, Seen, Step, batch_groups, batches, on_hosts


class Past(msgspec.Struct, frozen=True, kw_only=True):
    """Of the steps of a plan, by their ids."""

    begun: frozenset[str]
    done: frozenset[str]


def touched_hosts(plan: Plan, past: Past) -> list[str]:
    """Those that are not as they were, or were not in between; in the order of the plan."""
    return list(dict.fromkeys(step.host for step in _begun(plan, past) if step.kind in CHANGING))


def versioned_hosts(plan: Plan, past: Past) -> set[str]:
    """Those that may have the new version."""
    return {step.host for step in _begun(plan, past) if step.kind in VERSIONED}


def switched_balancers(plan: Plan, past: Past) -> list[str]:
    """Those that may have been."""
    return list(dict.fromkeys(step.balancer for step in _begun(plan, past) if step.kind is Kind.SWITCH))


def lost_hosts(plan: Plan, past: Past, seen: Seen) -> list[str]:
    """Those that have the new version, and nobody knows which one they had: they stay as they are."""
    return sorted(versioned_hosts(plan, past) - seen.previous.keys())


def undo(deploy: Deploy, plan: Plan, past: Past, seen: Seen, balancers: Sequence[str]) -> Plan:
    """The plan that leads back. Empty: nothing was touched."""
    if deploy.strategy == "rolling":
        return _rolling(deploy, plan, past, seen, balancers)
    return _pooled(deploy, plan, past, seen)


def _rolling(deploy: Deploy, plan: Plan, past: Past, seen: Seen, balancers: Sequence[str]) -> Plan:
    """Those that are in the middle of their change first: they are down, and come back by it."""
    versioned = versioned_hosts(plan, past)
    lost = lost_hosts(plan, past, seen)
    names = [name for name in touched_hosts(plan, past) if name not in lost]
    broken = _in_the_middle(plan, past)
    hosts = [deploy.host(name) for name in sorted(names, key=lambda one: one not in broken)]
    made: list[Group] = []
    for number, batch in enumerate(batches(deploy, hosts, broken), 1):
        previous = {one.name: seen.previous.get(one.name, "") for one in batch}
        prefix = f"undo{number}"
        for group in batch_groups(deploy, prefix, batch, previous, balancers, with_stage=False, held=seen.held):
            # who was only taken out comes back as it is; nothing is watched for longer on the way back
            steps = tuple(
                step
                for step in group.steps
                if step.kind is not Kind.BAKE and (step.host in versioned or step.kind not in CHANGING)
            )
            if steps:
                made.append(Group(title=f"back: {group.title}", steps=steps))
    return tuple(made)


def _pooled(deploy: Deploy, plan: Plan, past: Past, seen: Seen) -> Plan:
    """All new connections to the old pool again, then the new one is given up."""
    begun, switched = _begun(plan, past), switched_balancers(plan, past)
    back = tuple(
        Step(
            id=f"undo.switch.{number}",
            kind=Kind.SWITCH,
            balancer=one,
            pool=seen.active or "",
            seconds=deploy.check_timeout_seconds,
        )
        for number, one in enumerate(switched, 1)
    )
    made = [Group(title=f"back: switch to {seen.active}", steps=back)] if back else []
    started = {step.host: step.version for step in begun if step.kind in VERSIONED}
    discarded = on_hosts(deploy, "undo", Kind.DISCARD, deploy.discard, [deploy.host(name) for name in started], started)
    if discarded:
        made.append(Group(title="back: discard", steps=discarded))
    return tuple(made)


def _begun(plan: Plan, past: Past) -> list[Step]:
    return [step for group in plan for step in group.steps if step.id in past.begun]


def _in_the_middle(plan: Plan, past: Past) -> set[str]:
    """Hosts with a step that was begun and is not done, or that has not come to its last."""
    last = {step.host: step.id for group in plan for step in group.steps if step.host}
    found = {step.host for step in _begun(plan, past) if step.id not in past.done}
    found |= {name for step in _begun(plan, past) if step.id not in past.done for name in step.hosts}
    return found | {name for name, step in last.items() if step not in past.done}
