"""Which versions of uvicorn connections can move on: moves stand on its internals, and were tested with these."""

from __future__ import annotations

import logging

import uvicorn

TESTED_FROM = (0, 54)
TESTED_BELOW = (0, 55)


def can_move(slot: int) -> bool:
    """Whether the installed uvicorn was tested. The worker in slot 0 warns, once for its generation."""
    version = tuple(int(part) for part in uvicorn.__version__.split(".")[:2])
    if TESTED_FROM <= version < TESTED_BELOW:
        return True
    if slot == 0:
        logging.getLogger("uvicorn.error").warning(
            "uvicorn %s: connections do not move in reloads, they are closed after their response; tested: %s to %s",
            uvicorn.__version__,
            ".".join(map(str, TESTED_FROM)),
            ".".join(map(str, TESTED_BELOW)),
        )
    return False
