"""`python -P -m handoff.worker.check_import APP INTERFACE [factory]`: import the application, say what it is."""

from __future__ import annotations

import os
import sys

from handoff.worker.load import BootFailure, add_directory, interface_of, load_application


def main(arguments: list[str]) -> int:
    target, interface, *rest = arguments
    add_directory(os.getcwd())
    try:
        application = load_application(target, "factory" in rest)
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
