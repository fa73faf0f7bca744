"""`python -P -m lb.catch_up FILE`: what the peers of a balancer know stands in its state directory after it.

`handoff lb run` runs it before anything is bound, beside itself: a master has no threads, and waits for no names. An
error is one line on standard error, the exit code 2; what else is worth knowing stands there too, a line each.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from handoff.errors import ExitCode, HandoffError
from lb.control.catching_up import catch_up_before_start
from lb.describe import state_directory
from lb.source import Source, load, source_options


@click.command()
@source_options
def main(**options: Any) -> None:
    """Ask the peers."""
    source = Source(**options)
    try:
        balancer = load(source)
        path = os.path.abspath(source.file or ".")
        near = path if source.file is None else os.path.dirname(path)
        state = Path(state_directory(balancer, near, os.environ, os.geteuid()))
        notes = catch_up_before_start(balancer, state, near)
    except HandoffError as error:
        sys.stderr.write(f"{' '.join(error.message.split())}\n")
        sys.stderr.flush()
        os._exit(ExitCode.USAGE)
    sys.stderr.write("".join(f"{note}\n" for note in notes))
    sys.stderr.flush()
    os._exit(0)  # a lookup of a name may hang in a thread


if __name__ == "__main__":
    main()
