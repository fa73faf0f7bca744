"""The command `handoff`. One line for an error, and the exit code of the table in handoff.errors."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from typing import NoReturn

from handoff.pacing import begin_pacing

_PACED_SECONDS = 1.0
"""Who types `handoff reload` on a busy machine does not want its clients to wait for the command itself."""


def main() -> None:
    """The console script. Ends the process."""
    if sys.platform != "linux":
        # Before anything else: most of what we import is not there on another system.
        sys.stderr.write(f"handoff: error: runs on Linux only (pidfds, memfds, SCM_RIGHTS); this is {sys.platform}\n")
        raise SystemExit(1)
    _open_standard_files()
    begin_pacing(_PACED_SECONDS)
    from handoff.errors import ExitCode

    try:
        from handoff.cli.commands import run_command

        status = run_command()
    except KeyboardInterrupt:  # while all that is imported; later ones become click's Abort
        status = ExitCode.ABORTED
    _end(status)


def _end(status: int) -> NoReturn:
    """The interpreter need not be taken apart: 15 ms of a processor, after a reload just when its connections move."""
    if threading.active_count() == 1:
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError, ValueError):  # else the interpreter is to say what it says then
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    raise SystemExit(status)


def _open_standard_files() -> None:
    """Where one of 0 to 2 is closed (`2>&-`), the next file that is opened would become stdin, stdout or stderr."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(opened, True)
