"""A worker's life: say hello, learn what to be, load the application, and serve it until the drain has ended."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

import uvloop
from uvicorn.logging import DefaultFormatter  # noqa: F401  (handoff's and uvicorn's modules come before the app's)

from handoff.channel import worker_end
from handoff.core.messages import Boot, Failed, Progress
from handoff.counters import WorkerCounters
from handoff.worker.context import Claims, current
from handoff.worker.fitting import check_fitting
from handoff.worker.http import HTTPService
from handoff.worker.library import AsyncWorker, Worker
from handoff.worker.link import Link
from handoff.worker.load import BootFailure, add_directory, failure_of, interface_of, is_async, load_application
from handoff.worker.logs import configure_program
from handoff.worker.wsgi import WSGIBridge

_FAILED_STATUS = 1
IN_MAIN = "in main(worker), which is to call worker.ready()"


def main() -> None:
    """Called by `handoff.worker.start`. Ends the process."""
    channel_fd = os.environ.pop("HANDOFF_CHANNEL", None)
    post_mortem_fd = os.environ.pop("HANDOFF_POST_MORTEM", None)
    if channel_fd is None or post_mortem_fd is None:
        raise SystemExit("handoff.worker: is started by `handoff run`, not by hand")
    # What a grandchild must not inherit: our channel would never see its end.
    for fd in (int(channel_fd), int(post_mortem_fd)):
        os.set_inheritable(fd, False)
    faulthandler.enable(int(post_mortem_fd))
    link = Link(worker_end(socket.socket(fileno=int(channel_fd))))
    boot = link.greet()
    try:
        _serve(boot, link)
    except BootFailure as failure:
        link.send(Failed(reason=failure.reason, traceback=failure.trace))
        raise SystemExit(_FAILED_STATUS) from None


def _serve(boot: Boot, link: Link) -> None:
    settings = boot.settings
    claims = Claims(boot)
    current.claims = claims
    counters = WorkerCounters(boot.counters_fd, boot.counters_row)
    os.set_inheritable(boot.mailbox_fd, False)
    add_directory(os.getcwd())
    application = load_application(settings.app, settings.factory)
    interface = interface_of(application) if settings.interface == "auto" else settings.interface
    check_fitting(settings, application, interface)
    if interface == "handoff":
        _run_main(application, boot, link, claims, counters)
        return
    if interface == "wsgi":
        application = WSGIBridge(application, threads=settings.threads, logger=logging.getLogger("uvicorn.error"))
    _run(boot, lambda: _run_http(application, boot, interface, link, claims, counters))


async def _run_http(
    application: Callable[..., Any], boot: Boot, interface: str, link: Link, claims: Claims, counters: WorkerCounters
) -> None:
    listeners = claims.unclaimed()
    for name, listener in listeners.items():
        if listener.type != socket.SOCK_STREAM:
            raise BootFailure(f"listener {name}: is UDP, which main(worker) and commands can serve; leave the bind out")
    service = HTTPService(application, boot, interface, link, listeners, counters)
    try:
        await service.run()
    except (BootFailure, SystemExit):
        raise
    except Exception as error:  # before ready it is a failed boot and must be told; after it, a crash with traceback
        if link.is_open:
            raise
        raise failure_of("start-up", error) from error


def _run_main(
    application: Callable[..., Any], boot: Boot, link: Link, claims: Claims, counters: WorkerCounters
) -> None:
    configure_program(boot)
    link.send(Progress(step=IN_MAIN))
    if is_async(application):

        async def run() -> None:
            await application(AsyncWorker(boot, link, claims, counters))

        _guard_until_open(link, lambda: _run(boot, run))
    else:
        worker = Worker(boot, link, claims, counters)
        _guard_until_open(link, lambda: application(worker))


def _guard_until_open(link: Link, call: Callable[[], Any]) -> None:
    """Before the commit an exception is a failed boot and is told to the master; after it, it is a crash."""
    try:
        call()
    except Exception as error:
        if link.is_open:
            raise
        raise failure_of("main(worker)", error) from error


def _run(boot: Boot, main: Callable[[], Any]) -> None:
    factory = uvloop.new_event_loop if boot.settings.loop == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())
