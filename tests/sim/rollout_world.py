"""Hosts and balancers that are played: what a deployer's real code talks to, and what goes wrong there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from handoff.errors import ExitCode, HandoffError
from lb.core.admin import (
    Answer,
    BackendStatus,
    Drain,
    PoolStatus,
    Prepare,
    Ready,
    Request,
    ServiceStatus,
    Status,
    Switch,
    Verify,
)
from lb.core.rollout.model import Deploy, Host
from lb.rollout.fleet import Fleet
from lb.rollout.transport import Done, Unreachable


class PlayedHost:
    """A transport. What it runs twice under one id, it runs once."""

    def __init__(self, world: World, host: Host) -> None:
        self.name = host.name
        self._world = world

    async def execute(
        self, service: str, token: int, operation: str, command: str, timeout: float, *, retry_lost: bool = False
    ) -> Done:
        world = self._world
        if self.name in world.unreachable:
            raise Unreachable(f"host {self.name}: connection refused")
        if token < world.tokens.get(self.name, 0):
            raise HandoffError(f"{service} is fenced: token {token}", ExitCode.ABORTED)
        world.tokens[self.name] = token
        if operation not in world.kept:
            if world.held is not None and world.held in command:
                world.has_come.set()
                await world.gate.wait()
            world.log.append(command)
            if "reload" in command:
                world.sick.discard(self.name)
                world.sick |= {self.name} & world.sick_after_reload
            world.kept[operation] = Done(1 if command in world.failing else 0, f"output of {command}")
        return world.kept[operation]

    async def stop(self, service: str, token: int, operation: str, timeout: float) -> Done:
        raise AssertionError("nothing is ended here")

    async def request(self, argv: Sequence[str], stdin: bytes, timeout: float) -> bytes:
        return b"v1\n"

    async def aclose(self) -> None:
        self._world.closed += 1


class PlayedBalancer:
    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self._world = world
        self.percents = {"blue": 100, "green": 0}
        self.revision = 1
        self.drained: set[str] = set()
        self.held: dict[str, str] = {}
        """Servers that somebody has put out: `maint by ann: why`."""
        self.is_slow_to_switch = False
        self.slow: list[Request] = []
        """Questions that did not come yet."""

    async def status(self) -> Status:
        self._world.on_look(self.name)
        if self.name in self._world.unreachable:
            raise Unreachable(f"balancer {self.name}: connection refused")
        pools: dict[str, dict[str, BackendStatus]] = {}
        for host in self._world.deploy.hosts:
            if host.server is not None:
                name = host.server.rpartition("/")[2]
                pools.setdefault(host.pool or "main", {})[name] = self._backend(host)
        percents = self.percents if "blue" in pools else {"main": 100}
        service = ServiceStatus(
            listen=(),
            algorithm="roundrobin",
            revision=self.revision,
            pools={
                name: PoolStatus(percent=percents.get(name, 0), backends=backends) for name, backends in pools.items()
            },
        )
        return Status(
            name="edge", generation=1, revision=1, is_durable=True, services={"shop": service}, relays=(), names={}
        )

    def _backend(self, host: Host) -> BackendStatus:
        is_up = host.name not in self._world.sick
        override = (
            "drain by rollout r: deploy v2" if host.server in self.drained else self.held.get(host.server or "", "")
        )
        state = override.partition(" ")[0] or "ready"
        return msgspec.convert(
            {
                **dict.fromkeys(("name", "address", "identity", "last_check"), ""),
                "override": override,
                **dict.fromkeys(("connections", "total", "failed", "reset", "sent_bytes", "received_bytes"), 0),
                "administrative": state,
                "health": "up" if is_up else "down",
                "is_ejected": False,
                "weight": 1,
                "is_eligible": is_up and state == "ready",
                "backup": False,
                "maxconn": None,
                "since_seconds": 0,
                "connect_seconds": 0,
            },
            BackendStatus,
        )

    async def ask(self, request: Request, timeout: float) -> Answer:
        line = f"{self.name} {type(request).__name__.lower()}"
        if not isinstance(request, Verify):
            self._world.log.append(line)
        self._world.before.get(line, lambda: None)()
        if self.is_slow_to_switch and isinstance(request, Switch):
            self.slow.append(request)
            raise Unreachable(f"balancer {self.name}: no answer in time")
        answer = self._answer(request)
        self._world.after.get(line, lambda: None)()
        return answer

    def _answer(self, request: Request) -> Answer:
        world = self._world
        if self.name in world.unreachable:
            raise Unreachable(f"balancer {self.name}: connection refused")
        assert request.fence == "deploy/shop"
        if request.token < world.tokens.get(self.name, 0):
            return Answer(exit_code=7, message="is fenced")
        world.tokens[self.name] = request.token
        match request:
            case Drain():
                self.drained.add(request.server)
            case Ready() | Verify() if self._is_sick(request.server):
                return Answer(exit_code=4, message=f"{request.server} is down; nothing changed")
            case Ready():
                self.drained.discard(request.server)
            case Prepare():
                return Answer(exit_code=0, message="prepared", revision=self.revision)
            case Switch():
                if request.revision != self.revision:
                    return Answer(exit_code=9, message=f"shop is at revision {self.revision} by now; nothing changed")
                if self.name not in world.liars:
                    self.switch(request.pool, request.percent)
                if self.name in world.cut_off_at_switch:
                    world.unreachable.add(self.name)
                if self.name in world.answers_lost | world.unreachable:
                    raise Unreachable(f"balancer {self.name}: connection lost")
        return Answer(exit_code=0, message="done", revision=self.revision)

    def _is_sick(self, server: str) -> bool:
        return any(one.server == server and one.name in self._world.sick for one in self._world.deploy.hosts)

    def switch(self, pool: str, percent: int) -> None:
        other = "green" if pool == "blue" else "blue"
        self.percents = {pool: percent, other: 100 - percent}
        self.revision += 1

    async def store_call(self, request: bytes, timeout: float) -> bytes:
        raise AssertionError("the store is a file here")

    async def aclose(self) -> None:
        self._world.closed += 1


class World:
    """What hosts and balancers there are, what went on, what fails."""

    def __init__(self, deploy: Deploy) -> None:
        self.deploy = deploy
        self.log: list[str] = []
        self.kept: dict[str, Done] = {}
        self.tokens: dict[str, int] = {}
        self.failing: set[str] = set()
        self.sick: set[str] = set()
        self.sick_after_reload: set[str] = set()
        self.unreachable: set[str] = set()
        self.answers_lost: set[str] = set()
        """Balancers whose answers to a switch do not come."""
        self.cut_off_at_switch: set[str] = set()
        """Those that nobody reaches once they have switched."""
        self.liars: set[str] = set()
        """Those that say they have switched, and have not."""
        self.before: dict[str, Callable[[], None]] = {}
        self.after: dict[str, Callable[[], None]] = {}
        """What somebody does right before, and after, this line of the log."""
        self.on_look: Callable[[str], None] = lambda name: None
        """Each time that a balancer is asked how it is."""
        self.held: str | None = None
        """Commands with this in them wait for the gate."""
        self.gate, self.has_come = asyncio.Event(), asyncio.Event()
        self.closed = 0
        self.balancers = {name: PlayedBalancer(self, name) for name in deploy.balancers}

    def fleet(self) -> Fleet:
        return Fleet(self.deploy, self.balancers.__getitem__, lambda host: PlayedHost(self, host))
