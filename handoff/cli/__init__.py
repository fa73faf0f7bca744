"""The command `handoff`. One line for an error, and the exit code of the table in handoff.errors."""

from __future__ import annotations

import sys


def main() -> None:
    """The console script. Ends the process."""
    if sys.platform != "linux":
        # Before anything else: most of what we import is not there on another system.
        sys.stderr.write(f"handoff: error: runs on Linux only (pidfds, memfds, SCM_RIGHTS); this is {sys.platform}\n")
        raise SystemExit(1)
    from handoff.errors import ExitCode

    try:
        from handoff.cli.commands import run_command

        status = run_command()
    except KeyboardInterrupt:  # while all that is imported; later ones become click's Abort
        status = ExitCode.ABORTED
    raise SystemExit(status)
