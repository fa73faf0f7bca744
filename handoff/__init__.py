"""handoff: serve a Python app and deploy it at any moment, under full load, without a client noticing.

For applications: `listener(name)`, and `Worker` and `AsyncWorker`, which `main(worker)` gets, and
`Protocol`, for connections that move.
"""

from __future__ import annotations

from handoff.version import __version__

TYPE_CHECKING = False
"""As typing's: to import that takes milliseconds, which a boot wants to spend after its first pause."""
if TYPE_CHECKING:
    from typing import Any

    from handoff.worker.context import listener as listener
    from handoff.worker.library import AsyncWorker as AsyncWorker
    from handoff.worker.library import Worker as Worker
    from handoff.worker.raw import Protocol as Protocol

__all__ = ["AsyncWorker", "Protocol", "Worker", "__version__", "listener"]


def __getattr__(name: str) -> Any:
    """What is for workers is imported when it is asked for: the master never loads it (PEP 562)."""
    if name == "listener":
        from handoff.worker.context import listener

        return listener
    if name == "Protocol":
        from handoff.worker.raw import Protocol

        return Protocol
    if name in ("AsyncWorker", "Worker"):
        from handoff.worker import library

        return getattr(library, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
