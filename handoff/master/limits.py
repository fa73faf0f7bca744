"""Resource limits."""

from __future__ import annotations

import contextlib
import resource


def raise_fd_limit() -> None:
    """Raise the soft limit of open files to the hard one; workers inherit it. Each connection needs one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # a hard limit of infinity is above the system's own
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
