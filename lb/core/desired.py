"""What a rollout wants a service's connections to be led to, as its store tells balancers that look there."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from lb.core.model import Balancer, Service
from lb.core.overrides import Overrides, Shares, fenced, shares_of, with_shares

PREFIX = "desired/"
"""Of the keys: `desired/SERVICE`."""


class Desired(msgspec.Struct, frozen=True, kw_only=True):
    """The value of such a key."""

    pool: str
    percent: int
    token: int
    """Of the lock `deploy/SERVICE`."""
    who: str = ""
    why: str = ""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    service: str
    desired: Desired
    version: int
    """Of the key in its store."""

    @property
    def order(self) -> tuple[int, int]:
        """A later token counts as later in a store that was lost and begun anew, too."""
        return self.desired.token, self.version

    @property
    def fence(self) -> str:
        return f"deploy/{self.service}"


def is_news(overrides: Overrides, wanted: Wanted) -> bool:
    """It was not taken yet, nor anything later. What an operator has switched since stays so."""
    return wanted.order > overrides.desired.get(wanted.service, (0, 0))


def noted(overrides: Overrides, wanted: Wanted) -> Overrides:
    """It was taken."""
    return msgspec.structs.replace(overrides, desired={**overrides.desired, wanted.service: wanted.order})


def taken(overrides: Overrides, balancer: Balancer, wanted: Iterable[Wanted], now: float) -> Overrides:
    """As they are wanted, whatever the health: by who is about to start, and was not there when it was decided."""
    services = {one.name: one for one in balancer.services}
    for one in wanted:
        service = services.get(one.service)
        if service is None or one.desired.pool not in service.pools or not is_news(overrides, one):
            continue
        admitted = fenced(overrides, one.fence, one.desired.token)
        if admitted is None:
            continue
        shares = Shares(
            shares=shares_with(service, shares_of(service, admitted), one.desired.pool, one.desired.percent),
            who=one.desired.who,
            why=one.desired.why,
            at=now,
        )
        overrides = noted(with_shares(admitted, service, shares), one)
    return overrides


def shares_with(service: Service, present: dict[str, int], pool: str, percent: int) -> dict[str, int]:
    """The rest goes to the pool that has most of it."""
    others = {name: share for name, share in present.items() if name != pool} or {
        name: 0 for name in service.pools if name != pool
    }
    if percent == 100 or not others:
        return {pool: 100}
    return {pool: percent, max(others, key=lambda name: others[name]): 100 - percent}
