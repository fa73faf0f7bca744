"""What is asked of the backends again and again: their checks, and their agents. What comes of it stands in records."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping

import msgspec

from lb.control.agent import ask_agent
from lb.control.checker import Checker
from lb.control.checks import Result, check_backend, warm_up
from lb.control.command import Commands
from lb.control.tls import Contexts
from lb.core.agent import Said, after
from lb.core.compose import Present, Record, administrative_of
from lb.core.model import Check, SendProxy, Service
from lb.core.overrides import Overrides
from lb.core.standing import Administrative, Health, Outcome, Thresholds

MAXIMUM_AT_ONCE = 64
"""Checks, of all services; and as many agents."""
MAXIMUM_WARMING = 8
"""Backends that are warmed up at once."""

_LOG = logging.getLogger("handoff.lb")


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """Backends for which all of this is the same are one, and are asked once."""

    check: Check
    address: str
    typed: str = ""
    """The address as it is configured; for an agent it does not matter."""
    send_proxy: SendProxy = "off"


class Probes:
    """Keeps the records, by identity, which it is given and shares with the controller. `find`: a backend that is
    present, and its service; `on_change`: something is another way now."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        records: dict[str, Record],
        find: Callable[[str], tuple[Present, Service] | None],
        on_change: Callable[[], None],
    ) -> None:
        self._records, self._find, self._on_change = records, find, on_change
        self._contexts = Contexts()
        self._commands = Commands(os.environ)
        self._checking = asyncio.Semaphore(MAXIMUM_AT_ONCE)
        self._asking = asyncio.Semaphore(MAXIMUM_AT_ONCE)
        self._warming = asyncio.Semaphore(MAXIMUM_WARMING)
        self._checks = Checker(tasks, self._check, self._on_result, self._is_changing)
        self._agents = Checker(tasks, self._ask, self._on_answer, self._is_unheard)
        self.counts: dict[str, dict[str, int]] = {}
        """How many of each outcome, by identity."""
        self.seconds: dict[str, float] = {}
        self.passed_from: dict[str, float] = {}
        """When the latest check began, if it passed; monotonic."""

    def ask_only(self, present: Mapping[str, Present], services: Mapping[str, Service], overrides: Overrides) -> None:
        """These backends, and no others."""
        checks, agents = {}, {}
        for identity, one in present.items():
            service = services.get(one.service)
            if service is None or not one.is_known:
                continue
            address = one.backend.address
            if service.health_check is not None and one.standing.is_checked:
                checks[identity] = Task(
                    check=service.health_check, address=address, typed=one.typed, send_proxy=service.send_proxy
                )
            # In the maintenance that its agent asks for, it is only the agent that can end it.
            if service.agent_check is not None and administrative_of(overrides, one.key) is not Administrative.MAINT:
                agents[identity] = Task(check=service.agent_check, address=address)
        self._checks.check_only(checks)
        self._agents.check_only(agents)
        for kept in (self.counts, self.seconds, self.passed_from):
            for identity in [identity for identity in kept if identity not in present]:
                del kept[identity]

    def hurry(self, identity: str) -> None:
        """Somebody could not connect to it, or wants to know how it is now."""
        self._checks.hurry(identity)

    def close(self) -> None:
        self._commands.close()

    # --- checks -----------------------------------------------------------------------------------------------------

    async def _check(self, task: Task, identities: frozenset[str]) -> dict[str, Result]:
        check = task.check
        if check.type == "command":
            result = await self._commands.run(check, task.address, task.typed)
        else:
            async with self._checking:
                result = await check_backend(check, task.address, task.send_proxy, task.typed, self._contexts)
        found = dict.fromkeys(identities, result)
        if check.warm_up and result.outcome is Outcome.PASSED:
            rising = [identity for identity in identities if self._is_rising(identity, check)]
            if rising:
                async with self._warming:
                    warm = await warm_up(check, task.address, task.send_proxy, task.typed, self._contexts)
                found |= dict.fromkeys(rising, warm)
        return found

    def _is_rising(self, identity: str, check: Check) -> bool:
        """One more check that passes makes it up."""
        checked = self._records.get(identity, Record()).checked
        rises = checked.after(Outcome.PASSED, Thresholds(check.rise, check.fall))
        return rises.health is Health.UP and checked.health is not Health.UP

    def _on_result(self, identity: str, result: Result) -> None:
        found = self._find(identity)
        if found is None or found[1].health_check is None or not found[0].standing.is_checked:
            return
        one, check = found[0], found[1].health_check
        counts = self.counts.setdefault(identity, {})
        counts[result.outcome.value] = counts.get(result.outcome.value, 0) + 1
        self.seconds[identity] = result.seconds
        if result.outcome is Outcome.PASSED:
            self.passed_from[identity] = time.monotonic() - result.seconds
        else:
            self.passed_from.pop(identity, None)
        record = self._records.get(identity, Record())
        changed = record.checked.after(result.outcome, Thresholds(check.rise, check.fall))
        self._records[identity] = msgspec.structs.replace(record, checked=changed, last_check=result.reason)
        if changed.health is not record.checked.health:
            level = logging.INFO if changed.health is Health.UP else logging.WARNING
            was, is_now = record.checked.health.value, changed.health.value
            _LOG.log(level, "%s %s -> %s (%s)", _name(one), was, is_now, result.reason)
            self._on_change()

    def _is_changing(self, identity: str) -> bool:
        return self._records.get(identity, Record()).checked.is_changing

    # --- agents -----------------------------------------------------------------------------------------------------

    async def _ask(self, task: Task, identities: frozenset[str]) -> dict[str, Said | str]:
        async with self._asking:
            answer = await ask_agent(task.check, task.address)
        return dict.fromkeys(identities, answer)

    def _on_answer(self, identity: str, answer: Said | str) -> None:
        """A string: why there is none, which changes nothing."""
        found = self._find(identity)
        if found is None or found[1].agent_check is None:
            return
        record = self._records.get(identity, Record())
        if isinstance(answer, str):
            if answer != record.last_agent:
                _LOG.warning("%s: its agent does not answer: %s", _name(found[0]), answer)
                self._records[identity] = msgspec.structs.replace(record, last_agent=answer)
            return
        said = after(record.said, answer)
        self._records[identity] = msgspec.structs.replace(record, said=said, last_agent="")
        if said != record.said:
            unknown = f"; not known: {', '.join(said.unknown)}" if said.unknown else ""
            level = logging.INFO if _is_news(record.said, said) else logging.DEBUG
            _LOG.log(level, "%s: its agent says %s%s", _name(found[0]), said, unknown)
            self._on_change()

    def _is_unheard(self, identity: str) -> bool:
        return self._records.get(identity, Record()).said is None


def _is_news(former: Said | None, said: Said) -> bool:
    """Worth a line: a weight that follows the load is not."""
    if former is None:
        return True
    return (former.administrative, former.health, former.unknown) != (said.administrative, said.health, said.unknown)


def _name(one: Present) -> str:
    return f"{one.service}/{one.pool}/{one.shown}"
