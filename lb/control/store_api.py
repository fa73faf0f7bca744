"""`POST /v1/store`: the store of rollouts that a balancer keeps, a file in its state directory, made at first use."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from pathlib import Path
from typing import NamedTuple

from handoff.errors import HandoffError
from lb.rollout.stores.base import Store, StoreError
from lb.rollout.stores.remote import (
    WATCH_SECONDS,
    Found,
    Request,
    Response,
    Txn,
    Watch,
    carry_out,
    decoded,
    encoded,
    failure,
)
from lb.rollout.stores.sqlite import SQLiteStore

FILE_NAME = "rollouts.db"
MAXIMUM_PENDING = 64
"""Requests that wait for the disk."""
MAXIMUM_WATCHES = 64
LOOK_SECONDS = 0.5
"""So often a watch looks at what another controller wrote: of the next generation, or the one before."""


class _Job(NamedTuple):
    request: Request
    loop: asyncio.AbstractEventLoop
    response: asyncio.Future[Response]


class StoreApi:
    """The file is used by one thread, off the loop. It is a daemon: a disk that does not answer holds up no end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._pending = 0
        self._watches = 0
        self._changed = asyncio.Event()
        self._is_ending = False

    async def reply(self, body: bytes) -> bytes:
        """Errors are answers, too."""
        try:
            request = decoded(body)
            response = await (self._watch(request) if isinstance(request, Watch) else self._do(request))
        except HandoffError as error:
            response = failure(error)
        return encoded(response)

    def end_watches(self) -> None:
        self._is_ending = True
        self._notify()

    def close(self) -> None:
        self._jobs.put(None)

    async def _watch(self, request: Watch) -> Response:
        """Holds no thread while it waits."""
        if self._watches >= MAXIMUM_WATCHES:
            raise StoreError(f"store {self._path}: {MAXIMUM_WATCHES} watch it already; try again")
        self._watches += 1
        try:
            deadline = time.monotonic() + min(max(request.seconds, 0.0), WATCH_SECONDS)
            look = Watch(request.prefix, request.after, 0.0)
            while True:
                changed = self._changed
                response = await self._do(look)
                left = deadline - time.monotonic()
                if not isinstance(response, Found) or response.entries or left <= 0 or self._is_ending:
                    return response
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left, LOOK_SECONDS)):
                        await changed.wait()
        finally:
            self._watches -= 1

    async def _do(self, request: Request) -> Response:
        """Raises HandoffError."""
        if self._pending >= MAXIMUM_PENDING:
            raise StoreError(f"store {self._path}: {MAXIMUM_PENDING} requests wait for it already; try again")
        loop = asyncio.get_running_loop()
        job = _Job(request, loop, loop.create_future())
        self._pending += 1
        job.response.add_done_callback(self._count)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="store", daemon=True)
            self._thread.start()
        self._jobs.put(job)
        response = await job.response
        if isinstance(request, Txn):
            self._notify()
        return response

    def _count(self, _: asyncio.Future[Response]) -> None:
        self._pending -= 1

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _work(self) -> None:
        store: Store | None = None
        while (job := self._jobs.get()) is not None:
            try:
                store = store or SQLiteStore(self._path)
                found: Response | Exception = carry_out(store, job.request)
            except Exception as error:  # whoever asked gets it, as it is
                found = error
            with contextlib.suppress(RuntimeError):  # the loop is closed
                job.loop.call_soon_threadsafe(_answer, job.response, found)
        if store is not None:
            store.close()


def _answer(future: asyncio.Future[Response], found: Response | Exception) -> None:
    if future.done():  # nobody waits any more
        return
    if isinstance(found, Exception):
        future.set_exception(found)
    else:
        future.set_result(found)
