"""Backends that are called by a name: which addresses it stands for. No I/O."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

import msgspec

from handoff.addresses import Bind, parse_bind
from lb.core.model import Family

MAXIMUM_ADDRESSES = 64
"""Of one name; those beyond count for nothing."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one name. Times are monotonic."""

    addresses: tuple[str, ...] = ()
    """Of the last good answer, each with the port, sorted. Empty: there was none yet."""
    at: float | None = None
    """When that came."""
    error: str = ""
    """Why the latest lookup failed; empty: it did not."""


def is_called_by_name(address: str) -> bool:
    bind = parse_bind(address)
    return bind.kind == "tcp" and not _is_numeric(bind.host)


def addresses_of(hosts: Iterable[str], port: int, family: Family) -> tuple[str, ...]:
    """The backends of an answer: of both families, or of one – the other counts only where that has none."""
    numeric = {ipaddress.ip_address(host) for host in hosts if _is_numeric(host)}
    if family != "both":
        version = 4 if family == "ipv4" else 6
        numeric = {one for one in numeric if one.version == version} or numeric
    ordered = sorted(numeric, key=lambda one: (one.version, int(one), str(one)))
    return tuple(str(Bind(kind="tcp", host=str(one), port=port)) for one in ordered[:MAXIMUM_ADDRESSES])


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
