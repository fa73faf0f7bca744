"""Backends that are called by a name: asked for again and again. The last good answer is kept."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import time
from collections.abc import Callable, Iterable

import msgspec

from handoff.addresses import parse_bind
from lb.control.resolver import Resolver
from lb.core.model import Family
from lb.core.naming import Answer, addresses_of, is_called_by_name

FIRST_RETRY_SECONDS = 0.5
"""After a failure, for a name that was never answered; then twice as long each time, up to the interval."""
LOOKUP_SECONDS = 10.0
"""Longer than that has failed, and is waited for on."""
JITTER = 0.1

_LOG = logging.getLogger("handoff.lb")


class Names:
    """One asyncio task for each name. Borrows the resolver. `answers` has what is known, by the address as typed;
    `on_answer` is called on the loop when it stands for others; `is_own` tells addresses that we listen on."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        resolver: Resolver,
        on_answer: Callable[[], None],
        is_own: Callable[[str], bool],
    ) -> None:
        self._group = tasks
        self._resolver, self._on_answer, self._is_own = resolver, on_answer, is_own
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._interval_seconds = 0.0
        self._family: Family = "both"
        self.answers: dict[str, Answer] = {}

    def ask_only(self, addresses: Iterable[str], interval_seconds: float, family: Family) -> None:
        """Each of these that is a name, and no other. A changed interval counts from the next answer on."""
        if family != self._family:  # asked anew, at once
            self._end(list(self._asking))
        self._interval_seconds, self._family = interval_seconds, family
        wanted = {address for address in addresses if is_called_by_name(address)}
        self._end(set(self._asking) - wanted)
        for address in set(self.answers) - wanted:
            del self.answers[address]
        for address in wanted - set(self._asking):
            self._asking[address] = self._group.create_task(self._ask(address, family))

    def _end(self, addresses: Iterable[str]) -> None:
        for address in addresses:
            self._asking.pop(address).cancel()

    async def _ask(self, address: str, family: Family) -> None:
        retry_seconds = FIRST_RETRY_SECONDS
        while True:
            await self._ask_once(address, family)
            seconds = self._interval_seconds
            if self.answers[address].error and not self.answers[address].addresses:
                seconds = min(retry_seconds, seconds)
                retry_seconds *= 2
            await asyncio.sleep(seconds * (1 + random.uniform(-JITTER, JITTER)))

    async def _ask_once(self, address: str, family: Family) -> None:
        bind = parse_bind(address)
        asked = self._resolver.ask(bind.host)
        try:
            await asyncio.wait([asked], timeout=LOOKUP_SECONDS)
            if not asked.done():
                self._failed(address, f"no answer within {LOOKUP_SECONDS:g} s")
            hosts = await asked
        except (OSError, UnicodeError) as error:  # a name may be no IDNA
            self._failed(address, _reason(error))
            return
        finally:
            asked.cancel()
        found = addresses_of(hosts, bind.port, family)
        good = tuple(one for one in found if not self._is_own(one))
        if not good:
            self._failed(address, f"{found[0]} is an address of this balancer" if found else "it has no address")
            return
        self._found(address, good)

    def _found(self, address: str, found: tuple[str, ...]) -> None:
        former = self.answers.get(address, Answer())
        self.answers[address] = Answer(addresses=found, at=time.monotonic())
        if former.error:
            _LOG.info("%s: its name is known again", address)
        if former.addresses != found:
            was = f", was {', '.join(former.addresses)}" if former.addresses else ""
            _LOG.info("%s: is %s%s", address, ", ".join(found), was)
            self._on_answer()

    def _failed(self, address: str, reason: str) -> None:
        former = self.answers.get(address, Answer())
        self.answers[address] = msgspec.structs.replace(former, error=reason)
        if former.error != reason:
            still = f"; still {', '.join(former.addresses)}" if former.addresses else ""
            _LOG.warning("%s: its name is not known (%s)%s", address, reason, still)
        if not former.error and not former.addresses:  # clients need not wait for it any more
            self._on_answer()


def _reason(error: OSError | UnicodeError) -> str:
    if isinstance(error, socket.gaierror):
        return str(error.strerror).lower()
    return str(error)
