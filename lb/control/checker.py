"""When backends are checked: the first time at once, later one after another, faster while their state is changing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Hashable, Mapping
from typing import Generic, NamedTuple, Protocol, TypeVar

from lb.core.model import Check

JITTER = 0.1
"""Intervals are longer or shorter by up to this share."""
FAST_SHARE = 0.25
"""Of the interval, while the state is changing, where the configuration does not say."""


class Task(Hashable, Protocol):
    """What is to be asked. Whoever wants the same shares one round of asking."""

    @property
    def check(self) -> Check: ...


T = TypeVar("T", bound=Task)
R = TypeVar("R")
Ask = Callable[[T, frozenset[str]], Awaitable[Mapping[str, R]]]
"""Asks once; what comes of it for each of these identities."""


class Running(NamedTuple):
    task: asyncio.Task[None]
    members: set[str]
    joined: asyncio.Event
    """Somebody is new: ask now."""
    hurried: asyncio.Event
    """Somebody has found it not to work: ask now, or as soon as the faster interval allows."""


class Checker(Generic[T, R]):
    """One asyncio task for each thing that is to be asked. `on_result` is called on the loop; `is_changing` asks how a
    backend stands then."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        ask: Ask[T, R],
        on_result: Callable[[str, R], None],
        is_changing: Callable[[str], bool],
    ) -> None:
        self._group = tasks
        self._ask = ask
        self._on_result = on_result
        self._is_changing = is_changing
        self._running: dict[T, Running] = {}
        self._task_of: dict[str, T] = {}

    def check_only(self, wanted: Mapping[str, T]) -> None:
        """By identity. What runs for the same goes on."""
        for identity, task in list(self._task_of.items()):
            if wanted.get(identity) != task:
                self._leave(identity, task)
        for identity, task in wanted.items():
            if identity not in self._task_of:
                self._join(identity, task)
        for task, running in list(self._running.items()):
            if not running.members:
                running.task.cancel()
                del self._running[task]

    def hurry(self, identity: str) -> None:
        if identity in self._task_of:
            self._running[self._task_of[identity]].hurried.set()

    def _leave(self, identity: str, task: T) -> None:
        self._running[task].members.discard(identity)
        del self._task_of[identity]

    def _join(self, identity: str, task: T) -> None:
        self._task_of[identity] = task
        running = self._running.get(task)
        if running is not None:
            running.members.add(identity)
            if self._is_changing(identity):
                running.joined.set()
            return
        members, joined, hurried = {identity}, asyncio.Event(), asyncio.Event()
        asking = self._group.create_task(self._check(task, members, joined, hurried))
        self._running[task] = Running(asking, members, joined, hurried)

    async def _check(self, task: T, members: set[str], joined: asyncio.Event, hurried: asyncio.Event) -> None:
        interval, fast = task.check.interval_seconds, _fast_seconds(task.check)
        is_first = True
        if not self._are_changing(members):  # its health is known: no storm at our start
            await _wait(random.random() * interval, joined, hurried)
            is_first = False
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            hurried.clear()
            joined.clear()
            asked = frozenset(members)
            for identity, result in (await self._ask(task, asked)).items():
                if identity in members:  # who came meanwhile was not asked, and who left is not told
                    self._on_result(identity, result)
            seconds = (fast if self._are_changing(members) else interval) * _jitter()
            if is_first:  # all were asked at once; from here on they are spread
                seconds *= random.random()
                is_first = False
            await _wait(began + min(fast, seconds) - loop.time(), joined)
            await _wait(began + seconds - loop.time(), joined, hurried)

    def _are_changing(self, members: set[str]) -> bool:
        return any(self._is_changing(identity) for identity in members)


async def _wait(seconds: float, *events: asyncio.Event) -> None:
    """For so long, or until one of these is."""
    if seconds <= 0 or any(event.is_set() for event in events):
        return
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in waiting:
            one.cancel()


def _fast_seconds(check: Check) -> float:
    if check.fast_interval_seconds is not None:
        return min(check.fast_interval_seconds, check.interval_seconds)
    return check.interval_seconds * FAST_SHARE


def _jitter() -> float:
    return 1 + random.uniform(-JITTER, JITTER)
