"""`handoff host exec`: whether a command is to be run, joined, answered from what is kept, or refused."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from handoff.durations import MAX_DURATION_SECONDS, format_duration
from handoff.errors import ExitCode, HandoffError, UsageError
from handoff.resolve import clean_environment
from lb.host.operation import Operation, Request, Started
from lb.host.state import STATE_VARIABLE, ServiceState
from lb.host.supervisor import start

ORDERLY_SECONDS = 7 * 24 * 3600.0
ORDERLY_OPERATIONS = 1000
"""Of a service. Beyond, those that ended so long ago are forgotten when another one starts."""
LOCK_SECONDS = 30.0
"""For a lock that is held for moments."""


class Answer(msgspec.Struct, frozen=True):
    """The one line on stdout."""

    operation: str
    state: Literal["done", "running", "lost"]
    exit_code: int | None
    """Of the command; None: not known (yet)."""
    output: str
    seconds: float
    """How long it took, or takes until now; 0: not known."""

    def status(self) -> ExitCode:
        """Ours. PARTIAL for a lost one: some of it may have been done."""
        match self.state:
            case "done":
                return ExitCode.DONE if self.exit_code == 0 else ExitCode.FAILED
            case "running":
                return ExitCode.TIMED_OUT
            case "lost":
                return ExitCode.PARTIAL


class Asked(msgspec.Struct, frozen=True):
    """One call of `handoff host exec`."""

    token: int
    operation: str
    argv: tuple[str, ...]
    deadline: float
    """Monotonic: nobody waits longer for the command, which goes on."""
    is_lost_retried: bool
    environ: Mapping[str, str]


def execute(service: ServiceState, asked: Asked) -> Answer:
    """Raises HandoffError: ABORTED for an old token, REFUSED for another command under the id, LOCKED."""
    operation = service.operation(asked.operation)
    if any("\0" in word for word in asked.argv):
        raise UsageError(f"operation {operation.id}: its command has a NUL; no command can")
    request = Request(_digest(asked.argv), asked.token, time.time())
    while (older := _join_or_start(service, operation, request, asked)) is not None:
        if not older.wait(asked.deadline):
            raise _overtaken(service, older)
    operation.wait(asked.deadline)
    return answer_of(operation)


def stop(service: ServiceState, operation_id: str, token: int, deadline: float) -> Answer:
    """End its command, and wait for that. Raises HandoffError: REFUSED where there is none of that id."""
    operation = service.operation(operation_id)
    with service.locked(time.monotonic() + LOCK_SECONDS):
        service.admit(token)
        operation.stop()
    operation.wait(deadline)
    return answer_of(operation)


def answer_of(operation: Operation) -> Answer:
    """As it is now."""
    is_running = operation.is_running()
    started, result = operation.started(), operation.result()
    if result is not None:
        output = result.output.decode("utf-8", "replace")
        if result.left_out_bytes:
            output = f"[{result.left_out_bytes} bytes before this are left out]\n{output}"
        return Answer(operation.id, "done", result.exit_code, output, result.seconds)
    if started is None:
        raise HandoffError(f"operation {operation.id}: has not been started; ask for it, or again", ExitCode.REFUSED)
    output = operation.output().decode("utf-8", "replace")
    if is_running:
        return Answer(operation.id, "running", None, output, max(0.0, time.time() - started.started))
    return Answer(operation.id, "lost", None, output, 0.0)


def _join_or_start(service: ServiceState, operation: Operation, request: Request, asked: Asked) -> Operation | None:
    """It runs, or it has; or else the command of a fenced deployer that must end before it can be started."""
    with service.locked(time.monotonic() + LOCK_SECONDS):
        service.admit(asked.token)
        known = operation.request()
        if known is not None:
            if known.digest != request.digest:
                text = "was another command under this id; give each command an id of its own"
                raise HandoffError(f"operation {operation.id}: {text}", ExitCode.REFUSED)
            if operation.is_running() or operation.has_result():
                return None
            if operation.started() is not None and not asked.is_lost_retried:
                return None
        older = service.runs_under_an_older_token(asked.token)
        if older is None:
            _start(service, operation, request, asked)
        return older


def _start(service: ServiceState, operation: Operation, request: Request, asked: Asked) -> None:
    if service.count() > ORDERLY_OPERATIONS:
        service.forget(ORDERLY_SECONDS, ORDERLY_OPERATIONS)
    lock_fd = operation.begin(request, time.monotonic() + LOCK_SECONDS)
    environ = clean_environment(asked.environ)
    environ |= {"HANDOFF_OPERATION": operation.id, "HANDOFF_TOKEN": str(asked.token)}
    if STATE_VARIABLE in asked.environ:
        environ[STATE_VARIABLE] = asked.environ[STATE_VARIABLE]
    start(operation, lock_fd, asked.argv, environ)


def _overtaken(service: ServiceState, older: Operation) -> HandoffError:
    request, started = older.request(), older.started()
    token = "an older token" if request is None else f"the older token {request.token}"
    since = "" if started is None else f" for {_age(started)}"
    text = f"operation {older.id} of {token} still runs here{since}; wait for it, or handoff host stop it"
    return HandoffError(f"service {service.name}: {text}", ExitCode.LOCKED)


def _age(started: Started) -> str:
    return format_duration(round(max(0.0, time.time() - started.started)))


def _digest(argv: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(argv).encode("utf-8", "surrogateescape")).hexdigest()


def deadline_of(timeout_seconds: float | None) -> float:
    """Monotonic; None: as long as it takes, and that is a week."""
    return time.monotonic() + (MAX_DURATION_SECONDS if timeout_seconds is None else timeout_seconds)
