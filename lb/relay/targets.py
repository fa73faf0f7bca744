"""The backends as a relay worker has them: where they are, who is connected, how many over all relay workers."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

from handoff.addresses import parse_bind
from lb.core.latency import PeakAverage
from lb.core.table import Closing, Endpoint
from lb.page import COLUMNS, CURRENT, FIELDS, Page, PageFull

if TYPE_CHECKING:
    from lb.relay.relay import Relay

Address = tuple[socket.AddressFamily, str | tuple[str, int] | tuple[str, int, int, int]]

_LOG = logging.getLogger("handoff.lb")


class Target:
    """One backend. Lives as long as a table has it, or a connection to it."""

    __slots__ = (
        "_column",
        "_page",
        "address",
        "cells",
        "closing",
        "endpoint",
        "has_failed",
        "is_listed",
        "is_local",
        "latency",
        "relays",
    )

    def __init__(self, endpoint: Endpoint, page: Page) -> None:
        self.endpoint = endpoint
        self._page = page
        self._column: int | None = None
        self.cells = memoryview(bytearray(8 * FIELDS)).cast("Q")
        """Our own counters of it, by the fields of lb.page."""
        with contextlib.suppress(PageFull):
            self._column = page.column(endpoint.identity)
            self.cells = page.cells(self._column)
        if self._column is None:
            _LOG.warning("%s: is counted by each relay worker alone: more than %d backends", endpoint.identity, COLUMNS)
        self.address = _address(endpoint)
        """None: its name has no address yet, or its interface is not there; it is never chosen."""
        self.is_local = _is_loopback(self.address)
        """Within this machine, where a connection is made while we ask for it."""
        self.latency = PeakAverage()
        """Of connecting to it; kept where the algorithm asks for it."""
        self.relays: set[Relay] = set()
        self.has_failed = False
        """Its last attempt of ours failed."""
        self.closing: Closing | None = None
        """What is being done for `endpoint.closing`."""
        self.is_listed = True
        """In the present table."""

    @property
    def connections(self) -> int:
        """Now, over all relay workers, those that are being made included."""
        return self.cells[CURRENT] if self._column is None else self._page.current(self._column)

    def take_place(self) -> bool:
        """Count one more connection, unless that would be above its maxconn. What is taken must be given back."""
        self.cells[CURRENT] += 1
        limit = self.endpoint.maxconn
        if limit is not None and self.connections > limit:
            self.cells[CURRENT] -= 1
            return False
        return True

    def give_back(self) -> None:
        self.cells[CURRENT] -= 1


class Targets:
    """All of them by identity, over tables."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._known: dict[str, Target] = {}

    def __iter__(self) -> Iterator[Target]:
        return iter(list(self._known.values()))

    def get(self, endpoint: Endpoint) -> Target:
        """The target of an endpoint in the new table."""
        target = self._known.get(endpoint.identity)
        if target is None:
            target = self._known[endpoint.identity] = Target(endpoint, self._page)
        target.endpoint = endpoint
        target.is_listed = True
        if "%" in endpoint.address:
            target.address = _address(endpoint)  # an interface comes, goes, and comes with another number
        return target

    def adopt(self, endpoint: Endpoint) -> Target:
        """The target of a connection that another process made. If no table has it, it gets no new ones."""
        target = self._known.get(endpoint.identity)
        if target is None:
            target = self._known[endpoint.identity] = Target(endpoint, self._page)
            target.is_listed = False
        return target

    def unlist_all(self) -> None:
        """A new table comes; what it has is listed again."""
        for target in self._known.values():
            target.is_listed = False

    def drop_unused(self) -> None:
        """Those that no table has any more, and nobody is connected to."""
        gone = [one for one in self._known.values() if not one.is_listed and not one.cells[CURRENT]]
        for target in gone:
            del self._known[target.endpoint.identity]


def _address(endpoint: Endpoint) -> Address | None:
    try:
        return numeric_address(endpoint.address)
    except OSError:
        _LOG.warning("%s: there is no such interface on this machine", endpoint.identity)
        return None


def numeric_address(text: str) -> Address | None:
    """Of HOST:PORT, [V6%ZONE]:PORT or unix:PATH; None for a name. Raises OSError where there is no such interface."""
    bind = parse_bind(text)
    if bind.kind == "unix":
        return socket.AF_UNIX, bind.path
    host, _, zone = bind.host.partition("%")
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return None
    if version == 4:
        return socket.AF_INET, (host, bind.port)
    return socket.AF_INET6, (host, bind.port, 0, _scope(zone))


def _is_loopback(address: Address | None) -> bool:
    return address is not None and address[0] != socket.AF_UNIX and ipaddress.ip_address(address[1][0]).is_loopback


def _scope(zone: str) -> int:
    if not zone:
        return 0
    return int(zone) if zone.isdigit() else socket.if_nametoindex(zone)
