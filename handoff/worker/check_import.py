"""`python -P -m handoff.worker.check_import NAME…`: import an application, say what it is and whether its settings fit.

They come on standard input, as JSON. The names are those of the listeners that it may take.
"""

from __future__ import annotations

import os
import socket
import sys

import msgspec

from handoff.settings import Settings
from handoff.worker.context import current
from handoff.worker.fitting import check_fitting
from handoff.worker.load import BootFailure, add_directory, interface_of, load_application


def main(arguments: list[str]) -> int:
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=Settings)
    # Not the service's own addresses, which may be in use by it just now.
    current.claims = {name: socket.create_server(("127.0.0.1", 0)) for name in arguments}
    add_directory(os.getcwd())
    try:
        application = load_application(settings.app, settings.factory)
        interface = interface_of(application) if settings.interface == "auto" else settings.interface
        check_fitting(settings, application, interface)
    except BootFailure as failure:
        if failure.trace:
            sys.stderr.write(failure.trace + "\n")
        sys.stderr.write(f"handoff: error: {failure.reason}\n")
        return 1
    sys.stdout.write(f"{settings.app}: loads; interface {interface}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
