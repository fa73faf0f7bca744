"""The program of the controller: `main(worker)`, run by handoff as the companion of the relay workers."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec

from handoff import AsyncWorker
from lb.control.admin import Admin
from lb.control.controller import Controller
from lb.control.desired import DesiredWatch, near_of
from lb.control.relays import Relays
from lb.control.resolver import Resolver
from lb.control.server import AdminServer
from lb.control.store import Store
from lb.control.store_api import FILE_NAME, StoreApi
from lb.core.model import TYPED, Balancer
from lb.core.wire import PAGE_NAME
from lb.page import Page


class Arguments(msgspec.Struct, frozen=True, kw_only=True):
    """`worker.arguments`, as `lb.describe` prints them."""

    balancer: Balancer
    shown: str
    state: str


async def main(worker: AsyncWorker, resolver: Resolver | None = None) -> None:
    """Controls until the drain. `resolver`: another one than the machine's."""
    arguments = msgspec.convert(worker.arguments, Arguments)
    directory = Path(os.environ["HANDOFF_RUNTIME_DIRECTORY"])
    page = Page(directory / PAGE_NAME)
    relays = Relays(directory, worker.generation)
    controller = Controller(
        arguments.balancer, worker.generation, directory, Store(Path(arguments.state)), page, relays, resolver
    )
    if arguments.shown != TYPED:
        controller.file = arguments.shown
    store_api = StoreApi(Path(arguments.state) / FILE_NAME)
    admin = Admin(controller, store_api)
    server = AdminServer(admin, arguments.balancer, directory, worker.listeners)
    url = arguments.balancer.desired
    watch = DesiredWatch(controller, admin.commands, url, near_of(arguments.shown)) if url is not None else None
    try:
        await relays.open()
        await server.open()
        async with asyncio.TaskGroup() as tasks:
            controller.start(tasks)
            if watch is not None:
                watch.start()
            if await worker.ready():
                await worker.drained()
            store_api.end_watches()
            await server.close()
            raise _Ended
    except* _Ended:
        pass
    finally:
        if watch is not None:
            watch.close()
        controller.end()
        store_api.close()
        relays.close()
        page.close()


class _Ended(Exception):
    """Ends the group of tasks."""
