"""Addresses: which of them lead back to the balancer, that would relay to itself until nothing is left; which lead to
other machines."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Collection, Iterable
from pathlib import Path

import msgspec

from handoff.addresses import Bind, parse_bind
from handoff.errors import HandoffError
from lb.core.model import Balancer, Service

IS_OWN = "is an address that this balancer listens on itself"
"""Of a backend."""
_IP = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_own_address(balancer: Balancer, bind: Bind, near: str | None, bound: Iterable[str]) -> bool:
    """What is sent there comes back to this balancer. `near`: the directory of relative paths, where it is known;
    `bound`: where listeners really are, where that is known."""
    own = own_addresses(balancer.services, balancer.admin, near, bound)
    return any(is_same_address(resolved(bind, near), one) for one in own)


def own_addresses(
    services: tuple[Service, ...], admin: str | None, near: str | None, bound: Iterable[str] = ()
) -> list[Bind]:
    typed = [one for service in services for one in service.listen]
    return [resolved(parse_bind(one), near) for one in (*typed, *([admin] if admin else ()), *bound)]


def bound_addresses(listeners: Iterable[socket.socket]) -> tuple[str, ...]:
    """Where they really are, which fd:// and names do not say."""
    return tuple(str(one) for listener in listeners if (one := _bound(listener)) is not None)


def _bound(listener: socket.socket) -> Bind | None:
    """None: it has no path, or one from a directory that only who bound it knows."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        is_known = isinstance(name, str) and name.startswith("/")
        return Bind(kind="unix", path=name) if is_known else None
    return Bind(kind="tcp", host=name[0], port=name[1])


def is_vague(listener: Bind) -> bool:
    """Where it will be is known when it is bound."""
    return listener.kind == "fd" or listener.is_any_port or (listener.kind == "tcp" and _ip(listener.host) is None)


def refuse_own_backends(balancer: Balancer, near: str, bound: Collection[str]) -> None:
    """Of a configuration whose listeners are bound. Raises HandoffError."""
    own = [resolved(parse_bind(one), near) for one in bound]
    for service in balancer.services:
        for backends in service.pools.values():
            for backend in backends:
                bind = resolved(parse_bind(backend.address), near)
                if any(is_same_address(bind, one) for one in own):
                    raise HandoffError(f"service {service.name}: {backend.address} {IS_OWN}")


def resolved(bind: Bind, near: str | None) -> Bind:
    """With the one path of a unix socket, however it is written; `near`: the directory of relative ones, if known."""
    if bind.kind != "unix":
        return bind
    path = os.path.normpath(bind.path) if near is None else os.path.realpath(os.path.join(near, bind.path))
    return msgspec.structs.replace(bind, path=path)


def is_same_address(backend: Bind, listener: Bind) -> bool:
    """What is sent to the one, resolved, arrives at the other. Names are unknown here, but for localhost."""
    if backend.kind != listener.kind:
        return False
    if backend.kind == "unix":
        return backend.path == listener.path
    if backend.kind != "tcp" or backend.port != listener.port:
        return False
    target, own = _ip(backend.host), _ip(listener.host)
    if own is None or target is None:
        is_local_name = backend.host == "localhost" and (own is None or own.is_loopback or own.is_unspecified)
        return is_local_name or backend.host == listener.host
    if own.is_unspecified:
        return target.is_loopback or target.is_unspecified or _is_of_this_machine(target)
    return target == own or (target.is_unspecified and own.is_loopback)  # ip(7): who connects to "any" reaches itself


def is_exposed(listener: Bind, looks_up: bool = False) -> bool:
    """Other machines may reach it. `looks_up`: names, too, which may block; one that is unknown cannot be bound."""
    if listener.kind != "tcp":
        return False
    address = _ip(listener.host)
    if address is not None:
        return not address.is_loopback
    return looks_up and any(not one.is_loopback for one in _addresses_of(listener.host))


def _addresses_of(host: str) -> list[_IP]:
    try:  # as bytes: text would import the codec "idna" just now
        found = socket.getaddrinfo(host.encode("ascii"), None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return []
    return [one for _, _, _, _, address in found if (one := _ip(str(address[0]))) is not None]


def _ip(host: str) -> _IP | None:
    """None: a name."""
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return None
    return (found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None) or found


def _is_of_this_machine(ip: _IP) -> bool:
    """It can be bound, and not only because the machine allows that of any address, as it may for virtual IPs."""
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    try:
        if Path(f"/proc/sys/net/ipv{ip.version}/ip_nonlocal_bind").read_text().strip() != "0":
            return False
        with socket.socket(family, socket.SOCK_DGRAM) as made:
            made.bind(socket.getaddrinfo(str(ip), 0, family, socket.SOCK_DGRAM, 0, socket.AI_NUMERICHOST)[0][4])
    except OSError:
        return False
    return True
