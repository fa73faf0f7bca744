"""Backends that are called by a name: asked for again and again, off the loop. The last good answer is kept."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Iterable

from handoff.addresses import Bind, parse_bind

INTERVAL_SECONDS = 30.0
RETRY_SECONDS = 5.0
"""After a failure."""
LOOKUP_SECONDS = 20.0

_LOG = logging.getLogger("handoff.lb")


def is_called_by_name(address: str) -> bool:
    bind = parse_bind(address)
    if bind.kind != "tcp":
        return False
    try:
        ipaddress.ip_address(bind.host)
    except ValueError:
        return True
    return False


class Names:
    """One asyncio task for each name. `on_address` is called on the loop with the address as typed, and the numeric
    one that it stands for from now on."""

    def __init__(self, tasks: asyncio.TaskGroup, on_address: Callable[[str, str], None]) -> None:
        self._group = tasks
        self._on_address = on_address
        self._asking: dict[str, asyncio.Task[None]] = {}
        self.known: dict[str, str] = {}

    def ask_only(self, addresses: Iterable[str]) -> None:
        wanted = {address for address in addresses if is_called_by_name(address)}
        for address in set(self._asking) - wanted:
            self._asking.pop(address).cancel()
            self.known.pop(address, None)
        for address in wanted - set(self._asking):
            self._asking[address] = self._group.create_task(self._ask(address))

    async def _ask(self, address: str) -> None:
        bind = parse_bind(address)
        loop = asyncio.get_running_loop()
        has_failed = False
        while True:
            try:
                async with asyncio.timeout(LOOKUP_SECONDS):
                    found = await loop.getaddrinfo(bind.host, bind.port, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as error:  # TimeoutError is one; a name may be no IDNA
                if not has_failed:
                    _LOG.warning("%s: its name is not known (%s)%s", address, error, self._goes_on_with(address))
                has_failed = True
            else:
                has_failed = False
                hosts = sorted((str(one[4][0]) for one in found), key=lambda host: ":" in host)  # IPv4 first
                self._take(address, [str(Bind(kind="tcp", host=host, port=bind.port)) for host in hosts])
            await asyncio.sleep(RETRY_SECONDS if has_failed else INTERVAL_SECONDS)

    def _take(self, address: str, found: list[str]) -> None:
        """It stays with the address that it has for as long as the name stands for that one, too."""
        present = self.known.get(address)
        if found and present not in found:
            self.known[address] = found[0]
            if present is not None:
                _LOG.info("%s: is %s now, was %s", address, found[0], present)
            self._on_address(address, found[0])

    def _goes_on_with(self, address: str) -> str:
        return f"; still {self.known[address]}" if address in self.known else ""
