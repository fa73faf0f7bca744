"""`python -P -m handoff.worker.check_import APP INTERFACE factory|object NAME…`: import it, say what it is.

The names are those of the listeners that it may take.
"""

from __future__ import annotations

import os
import socket
import sys

from handoff.worker.context import current
from handoff.worker.load import BootFailure, add_directory, interface_of, load_application


def main(arguments: list[str]) -> int:
    target, interface, called, *names = arguments
    # Not the service's own addresses, which may be in use by it just now.
    current.claims = {name: socket.create_server(("127.0.0.1", 0)) for name in names}
    add_directory(os.getcwd())
    try:
        application = load_application(target, called == "factory")
        found = interface_of(application) if interface == "auto" else interface
    except BootFailure as failure:
        if failure.trace:
            sys.stderr.write(failure.trace + "\n")
        sys.stderr.write(f"handoff: error: {failure.reason}\n")
        return 1
    sys.stdout.write(f"{target}: loads; interface {found}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
