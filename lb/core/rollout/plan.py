"""The steps of a run: groups one after the other, the steps of a group side by side."""

from __future__ import annotations

import enum
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from lb.core.rollout.model import Deploy, Host


class Kind(enum.Enum):
    """What a step does."""

    HOOK = "hook"
    """A command on the deployer's machine."""
    STAGE = "stage"
    ONCE = "once"
    ACTIVATE = "activate"
    RELOAD = "reload"
    DISCARD = "discard"
    RETIRE = "retire"
    BUDGET = "budget"
    """Waits until the hosts of the batch may be out of service."""
    DRAIN = "drain"
    READY = "ready"
    HEALTHY = "healthy"
    """As READY, for a host that was not taken out: nobody's override is touched."""
    PREPARE = "prepare"
    SWITCH = "switch"
    BAKE = "bake"
    KEEP = "keep"


_PLACEHOLDER = re.compile(r"(?P<before>[${]?)\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)\}")

ON_HOSTS = frozenset({Kind.STAGE, Kind.ONCE, Kind.ACTIVATE, Kind.RELOAD, Kind.DISCARD, Kind.RETIRE})
VERSIONED = frozenset({Kind.ACTIVATE, Kind.RELOAD})
CHANGING = frozenset({Kind.DRAIN, *VERSIONED})
"""After one of these a host is not as it was."""


class Step(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`id` is its own within the run, and part of the operation's id on a host."""

    id: str
    kind: Kind
    host: str = ""
    balancer: str = ""
    command: str = ""
    """Filled and quoted; it holds no secrets, as it is journalled."""
    version: str = ""
    pool: str = ""
    percent: int = 100
    seconds: float = 0.0
    """How long a wait is, or how long may be waited."""
    hosts: tuple[str, ...] = ()
    """Of a batch; of what is watched."""


class Group(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    title: str
    steps: tuple[Step, ...]
    is_after_commit: bool = False
    """What fails here turns nothing back."""


Plan = tuple[Group, ...]


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What was observed before the plan was made."""

    previous: dict[str, str] = {}
    """The version of each host; those of which none is known are left out."""
    down: tuple[str, ...] = ()
    """Hosts that get no connections, on some balancer."""
    active: str | None = None
    """The pool that gets new connections, on every balancer."""
    held: dict[str, tuple[str, ...]] = {}
    """Hosts that somebody else has put out, and on which balancers: they stay out there."""


class CannotPlan(Exception):
    """One line: why there is no plan, and what to do."""


def filled(template: str, values: Mapping[str, str]) -> str:
    """The template with each `{name}` replaced by its value, quoted for `sh`. Raises ValueError where it is unknown.

    `${name}` is the shell's, and `{{name}}` another program's: both stay, but for names that are ours, where they would
    silently be something else.
    """

    def fill(found: re.Match[str]) -> str:
        before, name = found["before"], found["name"]
        if name in values and not before:
            return shlex.quote(values[name])
        if before and name not in values:
            return found[0]
        raise ValueError(f"{found[0]} is not known; known: {', '.join(f'{{{one}}}' for one in sorted(values))}")

    return _PLACEHOLDER.sub(fill, template)


def values_of(host: Host, version: str) -> dict[str, str]:
    """What may stand in braces in a command for a host."""
    return {**host.variables, "version": version, "host": host.name, "pool": host.pool or ""}


def rolling(deploy: Deploy, version: str, balancers: Sequence[str], seen: Seen) -> Plan:
    """Batch by batch, those that are down first."""
    hosts = sorted(deploy.hosts, key=lambda one: one.name not in seen.down)
    made = _hook(deploy, version, hosts)
    once = deploy.once
    for number, batch in enumerate(batches(deploy, hosts, seen.down), 1):
        versions = {one.name: version for one in batch}
        made += batch_groups(deploy, f"b{number}", batch, versions, balancers, once, held=seen.held)
        once = None
    return tuple(made)


def batches(deploy: Deploy, hosts: Sequence[Host], down: Iterable[str]) -> Iterator[list[Host]]:
    """Those that are down are never in one batch with others: the budget is not for them."""
    size = deploy.batch_size(len(deploy.hosts))
    absent = [one for one in hosts if one.name in down]
    present = [one for one in hosts if one.name not in down]
    for part in (absent, present):
        for at in range(0, len(part), size):
            yield part[at : at + size]


def batch_groups(
    deploy: Deploy,
    prefix: str,
    hosts: Sequence[Host],
    versions: Mapping[str, str],
    balancers: Sequence[str],
    once: str | None = None,
    with_stage: bool = True,
    held: Mapping[str, tuple[str, ...]] | None = None,
) -> list[Group]:
    """Out of the balancers, if it is to be, the new version, and in again; where somebody holds it, it stays out."""
    behind = [one for one in hosts if one.server is not None and balancers]
    names = tuple(one.name for one in behind)
    title = ", ".join(one.name for one in hosts)

    def at_balancers(kind: Kind, seconds: float, of_held: bool) -> list[Step]:
        return [
            Step(
                id=f"{prefix}.{kind.value}.{host.name}.{number}",
                kind=kind,
                host=host.name,
                balancer=one,
                seconds=seconds,
            )
            for host in behind
            for number, one in enumerate(balancers, 1)
            if (one in (held or {}).get(host.name, ())) is of_held
        ]

    groups: list[tuple[str, Sequence[Step]]] = []
    budget = Step(id=f"{prefix}.budget", kind=Kind.BUDGET, hosts=names, seconds=deploy.check_timeout_seconds)
    may_be_out = (f"{title}: may be out of service", [budget] if names else [])
    if deploy.drain:
        groups.append(may_be_out)
        groups.append((f"{title}: drain", at_balancers(Kind.DRAIN, deploy.drain_timeout_seconds, False)))
    if with_stage:
        groups.append((f"{title}: stage", on_hosts(deploy, prefix, Kind.STAGE, deploy.stage, hosts, versions)))
    groups.append((f"{hosts[0].name}: once", on_hosts(deploy, prefix, Kind.ONCE, once, hosts[:1], versions)))
    if not deploy.drain:  # who changes in service is touched now only, and what was seen long ago is not enough
        groups.append(may_be_out)
    groups.append((f"{title}: activate", on_hosts(deploy, prefix, Kind.ACTIVATE, deploy.activate, hosts, versions)))
    groups.append((f"{title}: reload", on_hosts(deploy, prefix, Kind.RELOAD, deploy.reload, hosts, versions)))
    up = Kind.READY if deploy.drain else Kind.HEALTHY
    steps = [
        *at_balancers(up, deploy.check_timeout_seconds, False),
        *at_balancers(Kind.HEALTHY, deploy.check_timeout_seconds, True),
    ]
    groups.append((f"{title}: in service", steps))
    if deploy.bake_seconds:
        bake = Step(id=f"{prefix}.bake", kind=Kind.BAKE, hosts=tuple(versions), seconds=deploy.bake_seconds)
        groups.append((f"{title}: bake", [bake]))
    return [Group(title=name, steps=tuple(steps)) for name, steps in groups if steps]


def pooled(deploy: Deploy, version: str, balancers: Sequence[str], seen: Seen) -> Plan:
    """blue-green and canary: the pool that is idle gets the version, and then the connections."""
    if seen.active is None:
        raise CannotPlan(f"service {deploy.service}: the active pool is not known; a switch needs a balancer")
    idle = idle_pool(deploy, seen.active)
    new = [one for one in deploy.hosts if one.pool == idle]
    versions = {one.name: version for one in new}
    made = _hook(deploy, version, new)
    for kind, command in (
        (Kind.STAGE, deploy.stage),
        (Kind.ONCE, deploy.once),
        (Kind.ACTIVATE, deploy.activate),
        (Kind.RELOAD, deploy.reload),
    ):
        where = new[:1] if kind is Kind.ONCE else new
        made.append(Group(title=f"{idle}: {kind.value}", steps=on_hosts(deploy, "new", kind, command, where, versions)))
    made += switch_groups(deploy, idle, tuple(versions), balancers, deploy.steps if deploy.strategy == "canary" else ())
    if deploy.retire is not None:
        old = [one for one in deploy.hosts if one.pool == seen.active]
        keep = Step(id="old.keep", kind=Kind.KEEP, pool=seen.active, seconds=deploy.keep_seconds)
        retired = on_hosts(deploy, "old", Kind.RETIRE, deploy.retire, old, {one.name: version for one in old})
        made.append(Group(title=f"{seen.active}: keep", steps=(keep,), is_after_commit=True))
        made.append(Group(title=f"{seen.active}: retire", steps=retired, is_after_commit=True))
    return tuple(group for group in made if group.steps)


def idle_pool(deploy: Deploy, active: str) -> str:
    """The other one of two. Raises CannotPlan."""
    others = [one for one in deploy.pools if one != active]
    if active not in deploy.pools or len(others) != 1:
        raise CannotPlan(
            f"service {deploy.service}: pool {active} is active, and the hosts are in {' and '.join(deploy.pools)}; "
            f"expected two pools, one of them active"
        )
    return others[0]


def switch_groups(
    deploy: Deploy, pool: str, hosts: tuple[str, ...], balancers: Sequence[str], steps: Sequence[int] = ()
) -> list[Group]:
    """Prepared on all balancers, then activated on all, step by step."""
    prepared = tuple(
        Step(id=f"prepare.{number}", kind=Kind.PREPARE, balancer=one, pool=pool, seconds=deploy.check_timeout_seconds)
        for number, one in enumerate(balancers, 1)
    )
    made = [Group(title=f"{pool}: prepare the switch", steps=prepared)]
    for percent in (*steps, 100):
        switched = tuple(
            Step(
                id=f"switch{percent}.{number}",
                kind=Kind.SWITCH,
                balancer=one,
                pool=pool,
                percent=percent,
                seconds=deploy.check_timeout_seconds,
            )
            for number, one in enumerate(balancers, 1)
        )
        made.append(Group(title=f"{pool}: switch to {percent} %", steps=switched))
        if deploy.bake_seconds:
            bake = Step(
                id=f"bake{percent}",
                kind=Kind.BAKE,
                hosts=hosts,
                pool=pool,
                percent=percent,
                seconds=deploy.bake_seconds,
            )
            made.append(Group(title=f"{pool}: bake at {percent} %", steps=(bake,)))
    return made


def on_hosts(
    deploy: Deploy,
    prefix: str,
    kind: Kind,
    command: str | None,
    hosts: Sequence[Host],
    versions: Mapping[str, str],
) -> tuple[Step, ...]:
    """One step for each host; none where there is no command."""
    if command is None:
        return ()
    return tuple(
        Step(
            id=f"{prefix}.{kind.value}.{host.name}",
            kind=kind,
            host=host.name,
            command=filled(command, values_of(host, versions[host.name])),
            version=versions[host.name],
            seconds=deploy.step_timeout_seconds,
        )
        for host in hosts
    )


def _hook(deploy: Deploy, version: str, hosts: Sequence[Host]) -> list[Group]:
    if not hosts:
        raise CannotPlan(f"service {deploy.service}: no host takes part")
    if deploy.before is None:
        return []
    command = filled(deploy.before, {"version": version})
    step = Step(id="before", kind=Kind.HOOK, command=command, seconds=deploy.step_timeout_seconds)
    return [Group(title="before", steps=(step,))]
