"""What can go wrong for an operator, and the exit code that says so."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """The one table of exit codes; every command of handoff uses it."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    ROLLED_BACK = 3
    TIMED_OUT = 4
    NO_SUCH_SERVICE = 5
    LOCKED = 6
    ABORTED = 7
    PARTIAL = 8
    REFUSED = 9


class HandoffError(Exception):
    """The operator's error: printed as one clear line, without a traceback.

    The message names subject, value, limit and remedy.
    """

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code


class UsageError(HandoffError):
    """A value that the operator typed, in a file or on the command line, is not one that we take."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.USAGE)
