"""Finding what an operator named: a service, a pool, a backend. No I/O."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NamedTuple

from lb.core.model import Backend, Balancer, Service
from lb.core.overrides import Overrides, key_of, pools_of

USAGE, TIMED_OUT, UNKNOWN, FENCED, REFUSED = 2, 4, 5, 7, 9
"""Exit codes of the design's table."""


class Refusal(Exception):
    """The answer is no."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.message = message


class Found(NamedTuple):
    service: Service
    pool: str
    backend: Backend

    @property
    def key(self) -> str:
        return key_of(self.service.name, self.pool, self.backend.name)


def find_service(balancer: Balancer, name: str) -> Service:
    """Raises Refusal."""
    for service in balancer.services:
        if service.name == name:
            return service
    raise Refusal(UNKNOWN, f"there is no service {name}{nearest(name, (one.name for one in balancer.services))}")


def find_pool(balancer: Balancer, text: str) -> tuple[Service, str]:
    """SERVICE/POOL. Raises Refusal."""
    name, separator, pool = text.partition("/")
    if not separator or not pool:
        raise Refusal(USAGE, f"{text}: expected SERVICE/POOL")
    service = find_service(balancer, name)
    check_pool(service, pool)
    return service, pool


def check_pool(service: Service, pool: str) -> None:
    """Raises Refusal."""
    if pool not in service.pools:
        raise Refusal(UNKNOWN, f"{service.name} has no pool {pool}{nearest(pool, service.pools)}")


def find_backend(balancer: Balancer, overrides: Overrides, text: str) -> Found:
    """SERVICE/SERVER or SERVICE/POOL/SERVER; a server's name may hold slashes. Raises Refusal."""
    name, separator, rest = text.partition("/")
    if not separator or not rest:
        raise Refusal(USAGE, f"{text}: expected SERVICE/SERVER or SERVICE/POOL/SERVER")
    service = find_service(balancer, name)
    pools = pools_of(service, overrides)
    found = [
        Found(service, pool, backend)
        for pool, backends in pools.items()
        for backend in backends
        if rest in (backend.name, f"{pool}/{backend.name}")
    ]
    if len(found) > 1:
        keys = " or ".join(one.key for one in found)
        raise Refusal(USAGE, f"{text}: there are several of this name; say {keys}")
    if not found:
        known = [backend.name for backends in pools.values() for backend in backends]
        known += [f"{pool}/{backend.name}" for pool, backends in pools.items() for backend in backends]
        raise Refusal(UNKNOWN, f"{service.name} has no backend {rest}{nearest(rest, known)}")
    return found[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint: the one that was meant, or all there are."""
    names = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    shown = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
    return f"; there are: {shown}" if names else "; there are none"
