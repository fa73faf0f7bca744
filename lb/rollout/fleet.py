"""The hosts and the balancers of a rollout, reached when they are needed, and what they say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping

from handoff.errors import HandoffError
from lb.core.admin import BackendStatus, ServiceStatus, Status
from lb.core.rollout.gates import Counts
from lb.core.rollout.model import Deploy, Host
from lb.core.rollout.plan import CannotPlan, Seen
from lb.rollout.balancers import BalancerClient
from lb.rollout.transport import Transport, repeatedly

STATUS_TIMEOUT_SECONDS = 15.0
_OURS = " by rollout "
"""In what balancers tell of an override: `drain by rollout ID: deploy v2`."""


class Fleet:
    """Owns the ways to all of them until `aclose`."""

    def __init__(
        self, deploy: Deploy, balancer: Callable[[str], BalancerClient], transport: Callable[[Host], Transport]
    ) -> None:
        self.deploy = deploy
        self._balancer, self._transport = balancer, transport
        self._balancers: dict[str, BalancerClient] = {}
        self._transports: dict[tuple[str | None, str], Transport] = {}

    @classmethod
    def like(cls, other: Fleet, deploy: Deploy) -> Fleet:
        """The same ways, for a rollout that is a little different. They belong to the other one."""
        made = cls(deploy, other._balancer, other._transport)
        made._balancers, made._transports = other._balancers, other._transports
        return made

    def balancer(self, address: str) -> BalancerClient:
        if address not in self._balancers:
            self._balancers[address] = self._balancer(address)
        return self._balancers[address]

    def transport(self, host: Host) -> Transport:
        """Two places on one machine share one."""
        key = host.ssh, host.handoff
        if key not in self._transports:
            self._transports[key] = self._transport(host)
        return self._transports[key]

    async def aclose(self) -> None:
        everybody: list[BalancerClient | Transport] = [*self._balancers.values(), *self._transports.values()]
        await asyncio.gather(*(one.aclose() for one in everybody), return_exceptions=True)

    # --- what balancers say -----------------------------------------------------------------------------------------

    async def statuses(self, balancers: Iterable[str]) -> dict[str, ServiceStatus]:
        """Of our service, by balancer. Raises HandoffError where one does not answer, or does not have it."""
        names = list(balancers)
        found = await asyncio.gather(*(self._status(name) for name in names))
        return dict(zip(names, found, strict=True))

    async def _status(self, address: str) -> ServiceStatus:
        return await repeatedly(lambda: self.status_once(address))

    async def status_once(self, address: str) -> ServiceStatus:
        """For who asks again by himself: tries of tries would take minutes. Raises as `statuses` does."""
        async with asyncio.timeout(STATUS_TIMEOUT_SECONDS):
            status: Status = await self.balancer(address).status()
        service = status.services.get(self.deploy.service)
        if service is None:
            raise HandoffError(f"balancer {address}: has no service {self.deploy.service}")
        return service

    def down(self, statuses: Mapping[str, ServiceStatus]) -> set[str]:
        """Hosts that get no connections from some balancer."""
        found = set()
        for host in self.deploy.hosts:
            backends = [find_backend(host, status) for status in statuses.values()]
            if host.server is not None and any(one is None or not one.is_eligible for one in backends):
                found.add(host.name)
        return found

    def _held(self, statuses: Mapping[str, ServiceStatus]) -> dict[str, tuple[str, ...]]:
        """Put out by an operator, or by its agent; not by a rollout that has not come to its end."""
        found: dict[str, tuple[str, ...]] = {}
        for host in self.deploy.hosts:
            for address, status in statuses.items():
                backend = find_backend(host, status)
                if backend is not None and backend.administrative != "ready" and _OURS not in backend.override:
                    found[host.name] = (*found.get(host.name, ()), address)
        return found

    def counts(self, statuses: Mapping[str, ServiceStatus], hosts: Collection[str]) -> Counts:
        """Of these hosts, over all balancers."""
        found = Counts()
        for host in self.deploy.hosts:
            for status in statuses.values():
                backend = find_backend(host, status)
                if host.name in hosts and backend is not None:
                    found += Counts(
                        total=backend.total,
                        failed=backend.failed,
                        reset=backend.reset,
                        connect_seconds=backend.connect_seconds,
                    )
        return found

    # --- before a plan ----------------------------------------------------------------------------------------------

    async def look(self, versions: Mapping[str, str], current: Callable[[Host], str | None]) -> Seen:
        """What there is now. `versions`: of the hosts, as the journal has them; `current`: the command that tells of
        one that it does not have. Raises HandoffError, CannotPlan."""
        statuses = await self.statuses(self.deploy.balancers)
        missing = [
            f"{host.server} on {address}"
            for host in self.deploy.hosts
            for address, status in statuses.items()
            if host.server is not None and find_backend(host, status) is None
        ]
        if missing:
            raise CannotPlan(f"host with a server that is no backend: {', '.join(missing)}; add it to the balancer")
        previous = dict(versions)
        unknown = [one for one in self.deploy.hosts if one.name not in previous]
        gate = asyncio.Semaphore(self.deploy.parallel)
        told = await asyncio.gather(*(self._version(host, current(host), gate) for host in unknown))
        previous |= {host.name: version for host, version in zip(unknown, told, strict=True) if version}
        return Seen(
            previous={one.name: previous[one.name] for one in self.deploy.hosts if one.name in previous},
            down=tuple(sorted(self.down(statuses))),
            held=self._held(statuses),
            active=self._active(statuses) if self.deploy.strategy != "rolling" else None,
        )

    async def _version(self, host: Host, command: str | None, gate: asyncio.Semaphore) -> str:
        if command is None:
            return ""
        async with gate:
            answer = await self.transport(host).request(["sh", "-c", command], b"", STATUS_TIMEOUT_SECONDS)
        return answer.decode(errors="replace").strip()

    def _active(self, statuses: Mapping[str, ServiceStatus]) -> str | None:
        found = {address: active_pool(status) for address, status in statuses.items()}
        if len(set(found.values())) > 1 or None in found.values():
            shown = ", ".join(f"{address}: {pool or 'split'}" for address, pool in found.items())
            raise CannotPlan(
                f"service {self.deploy.service}: the balancers do not agree on one active pool ({shown}); "
                f"finish the rollout that was begun (handoff deploy resume), or switch them by hand"
            )
        return next(iter(found.values()), None)


def active_pool(status: ServiceStatus) -> str | None:
    """The pool that gets all new connections; None: they are split."""
    return next((name for name, pool in status.pools.items() if pool.percent == 100), None)


def find_backend(host: Host, status: ServiceStatus) -> BackendStatus | None:
    """SERVICE/SERVER is looked for in all pools, as the balancer does."""
    if host.server is None:
        return None
    *_, name = host.server.split("/")
    pools = [status.pools[host.pool]] if host.pool in status.pools else [] if host.pool else status.pools.values()
    return next((pool.backends[name] for pool in pools if name in pool.backends), None)
