"""What `deploy.toml` says, checked. Plain data; times in seconds."""

from __future__ import annotations

from typing import Literal

import msgspec

Strategy = Literal["rolling", "blue-green", "canary"]
OnFailure = Literal["rollback", "stop"]


class Host(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One place where a version runs. Two versions on two ports of one machine are two of them."""

    name: str
    ssh: str | None = None
    """As ssh(1) takes it; None: this machine."""
    server: str | None = None
    """The backend that it is: SERVICE/SERVER or SERVICE/POOL/SERVER. None: it takes part without a balancer."""
    handoff: str = "handoff"
    """The command there."""
    variables: dict[str, str] = {}
    """For the commands: `{port}`."""

    @property
    def pool(self) -> str | None:
        parts = (self.server or "").split("/")
        return parts[1] if len(parts) == 3 else None


class Gate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What must hold in a bake, beside the health of what is new. None: it is not asked for."""

    failed_percent: float | None = None
    """Attempts to connect to the new backends that failed: at most so many above those to the old ones."""
    reset_percent: float | None = None
    """Connections that ended by a reset or a limit: at most so many above the old ones."""
    connect_ratio: float | None = None
    """The mean time of connecting: at most so many times that of the old ones."""
    minimum_connections: int = 20
    """Of fewer nothing is said."""
    command: str | None = None
    """On the deployer's machine; its exit code 0 is a yes."""
    probe: str | None = None
    """A URL, http or https, that must answer 200 to 399."""


class Deploy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The whole file. Commands are lines for `sh`, in which {version} and what else is in braces is quoted."""

    service: str
    """What is rolled out; the lock's name, and the balancers' service."""
    strategy: Strategy = "rolling"
    balancers: tuple[str, ...] = ()
    store: str = "balancer"
    batch: str = "1"
    """Hosts at once: a number, or a percentage of all."""
    max_unavailable: int = 1
    """Hosts out of service at any moment of the run, those that were down before included."""
    drain: bool = False
    """rolling: a host is out of the balancers while it changes."""
    drain_timeout_seconds: float = 60.0
    """For its connections; what is left then is closed."""
    check_timeout_seconds: float = 60.0
    """For a new backend to be up."""
    step_timeout_seconds: float = 600.0
    """For a command on a host."""
    bake_seconds: float = 10.0
    keep_seconds: float = 600.0
    """blue-green, canary: how long the old pool is kept before `retire`."""
    steps: tuple[int, ...] = (10, 50)
    """canary: percent of new connections, ascending, below 100."""
    parallel: int = 10
    """Hosts that are worked on at once, at most."""
    lock_seconds: float = 60.0
    """A deployer that is silent for so long has lost the lock."""
    on_failure: OnFailure = "rollback"
    """rolling: the hosts that were touched go back, or everything stays as it is."""
    stage: str | None = None
    activate: str | None = None
    reload: str | None = None
    once: str | None = None
    """On one host, after the first staging and before the first activation."""
    discard: str | None = None
    """blue-green, canary: on the hosts of the new pool where it did not come to the switch, or was switched back."""
    retire: str | None = None
    """blue-green, canary: on the hosts of the old pool, after `keep`."""
    current: str | None = None
    """Prints the version that is active on a host; asked where the store knows none."""
    before: str | None = None
    """On the deployer's machine, first."""
    after: str | None = None
    """On the deployer's machine, whatever the verdict, which it gets as HANDOFF_VERDICT."""
    gate: Gate = Gate()
    hosts: tuple[Host, ...]

    def host(self, name: str) -> Host:
        return next(one for one in self.hosts if one.name == name)

    @property
    def pools(self) -> tuple[str, ...]:
        """Those that the hosts are in."""
        return tuple(dict.fromkeys(one.pool for one in self.hosts if one.pool is not None))

    def batch_size(self, hosts: int) -> int:
        """Of so many."""
        size = int(self.batch.rstrip("%"))
        if self.batch.endswith("%"):
            size = hosts * size // 100
        return max(1, min(size, self.max_unavailable))
