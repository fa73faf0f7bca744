"""A rollout that was committed, taken back: one switch, or the hosts' versions of before."""

from __future__ import annotations

from collections.abc import Sequence

from lb.core.rollout.model import Deploy
from lb.core.rollout.plan import CannotPlan, Group, Plan, Seen, batch_groups, batches, idle_pool, switch_groups
from lb.core.rollout.progress import Run


def go_back(deploy: Deploy, committed: Sequence[Run], seen: Seen) -> tuple[str, Plan]:
    """The version that will run, and the plan. `committed`: the runs, the newest first. Raises CannotPlan."""
    if deploy.strategy != "rolling":
        return _switch_back(deploy, seen)
    if not committed:
        raise CannotPlan(f"service {deploy.service}: no rollout was committed that could be rolled back")
    before = committed[0].seen.previous
    hosts = [
        one for one in deploy.hosts if before.get(one.name, seen.previous.get(one.name)) != seen.previous.get(one.name)
    ]
    if not hosts:
        raise CannotPlan(f"service {deploy.service}: no host has another version than before {committed[0].version}")
    hosts.sort(key=lambda one: one.name not in seen.down)
    groups: list[Group] = []
    for number, batch in enumerate(batches(deploy, hosts, seen.down), 1):
        versions = {one.name: before[one.name] for one in batch}
        groups += batch_groups(
            deploy, f"b{number}", batch, versions, deploy.balancers, with_stage=False, held=seen.held
        )
    return before[hosts[0].name], tuple(groups)


def _switch_back(deploy: Deploy, seen: Seen) -> tuple[str, Plan]:
    if seen.active is None:
        raise CannotPlan(f"service {deploy.service}: the active pool is not known; a switch needs a balancer")
    pool = idle_pool(deploy, seen.active)
    hosts = tuple(one.name for one in deploy.hosts if one.pool == pool)
    version = next((seen.previous[name] for name in hosts if name in seen.previous), pool)
    return version, tuple(switch_groups(deploy, pool, hosts, deploy.balancers))
