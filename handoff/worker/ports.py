"""Who holds a port that the application tried to bind itself: usually the live generation's worker."""

from __future__ import annotations

import contextlib
import os

import psutil


def foreign_holder() -> str:
    """Words for a failed bind: the ports that sibling workers listen on without having them from the master."""
    master = os.getppid()
    from_master = _ports_of(master)
    held: dict[int, int] = {}
    with contextlib.suppress(psutil.Error):
        for sibling in psutil.Process(master).children():
            if sibling.pid != os.getpid():
                held |= dict.fromkeys(_ports_of(sibling.pid) - from_master, sibling.pid)
    if not held:
        return "stop who holds it, or let handoff bind it: --bind NAME=:PORT and handoff.listener(NAME)"
    port, pid = min(held.items())
    others = sorted(set(held) - {port})
    also = f" (and {', '.join(map(str, others))} too)" if others else ""
    return (
        f"port {port}{also} is held by worker process {pid} of this service, because the application binds it itself; "
        f'add --bind metrics=:{port} and take it with handoff.listener("metrics")'
    )


def _ports_of(pid: int) -> set[int]:
    with contextlib.suppress(psutil.Error):
        connections = psutil.Process(pid).net_connections(kind="tcp")
        return {one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN}
    return set()
