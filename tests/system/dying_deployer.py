"""Deployers that are killed at a write to their journal, by SIGKILL: `handoff deploy …`, each a process of its own.

`python -P -m tests.system.dying_deployer` reads a `Wish` on each line of its stdin, forks a deployer, waits for its
end, and writes an `Outcome`. What a deployer needs is imported once: many of them are cheap.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import tempfile
from typing import IO, Any, NoReturn

import msgspec

from lb.rollout import cli, session
from lb.rollout.stores.sqlite import SQLiteStore, since_boot


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """To die at the `at`-th write, `before` it is made or `behind` it; 0: at none. The clock of its leases is `ahead`
    seconds ahead of the machine's, as if it had begun so much later."""

    arguments: list[str]
    when: str = "before"
    at: int = 0
    ahead: float = 0.0


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    exit_code: int
    """Negative: the signal that killed it."""
    output: str


class DyingStore(SQLiteStore):
    def __init__(self, wish: Wish, url: str) -> None:
        super().__init__(url.removeprefix("sqlite:"), clock=lambda: since_boot() + wish.ahead)
        self._wish = wish
        self._writes = itertools.count(1)

    def txn(self, *arguments: Any, **named: Any) -> int | None:
        is_last = next(self._writes) == self._wish.at
        if is_last and self._wish.when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        version = super().txn(*arguments, **named)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)
        return version


def live(wish: Wish, output: IO[bytes]) -> NoReturn:
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for fd, number in ((nowhere, 0), (output.fileno(), 1), (output.fileno(), 2)):
        os.dup2(fd, number)
    session.open_store = lambda url: DyingStore(wish, url)  # type: ignore[assignment]
    sys.argv = ["handoff deploy", *wish.arguments]
    try:
        cli.main()
    finally:  # it raises SystemExit, whatever it was
        sys.stdout.flush()
        ended = sys.exc_info()[1]
        os._exit(int(ended.code or 0) if isinstance(ended, SystemExit) else 1)


def outcome(wish: Wish) -> Outcome:
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            live(wish, output)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        return Outcome(exit_code=code, output=output.read().decode())


if __name__ == "__main__":
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(msgspec.json.encode(outcome(msgspec.json.decode(line, type=Wish))) + b"\n")
        sys.stdout.buffer.flush()
