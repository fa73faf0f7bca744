"""What is said over the control socket: one line of JSON each way, the request first, then its answers."""

from __future__ import annotations

import msgspec

from handoff.core.messages import Hold

MAXIMUM_REQUEST_BYTES = 16 * 1024


class Request(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=True, kw_only=True):
    pass


class Status(Request, frozen=True, tag="status"):
    drain: bool = False
    """Also ask the draining workers what holds them."""


class Reload(Request, frozen=True, tag="reload"):
    label: str | None = None
    wait: bool = True


class Rollback(Request, frozen=True, tag="rollback"):
    wait: bool = True


class Scale(Request, frozen=True, tag="scale"):
    workers: int


class Stop(Request, frozen=True, tag="stop"):
    now: bool = False
    generation: int | None = None


AnyRequest = Status | Reload | Rollback | Scale | Stop


class Answer(msgspec.Struct, frozen=True, tag_field="type", tag="answer", kw_only=True):
    """How a request ended; `exit_code` is one of the table in handoff.errors."""

    exit_code: int
    message: str
    generation: int | None = None
    traceback: str = ""
    seconds: float = 0.0


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    worker: int
    slot: int
    pid: int
    state: str
    age_seconds: float
    connections: int
    requests: int
    in_progress: int
    moved: int = 0
    """Connections handed over to other workers."""
    waiting: int = 0
    """Connections to be handed over that wait for room."""
    adopted: int = 0
    refused: int = 0
    interface: str = ""
    holds: tuple[Hold, ...] = ()
    holds_total: int = 0


class GenerationStatus(msgspec.Struct, frozen=True, kw_only=True):
    generation: int
    label: str
    state: str
    age_seconds: float
    workers_wanted: int
    directory: str
    python: str
    app: str
    crash_loop_slots: tuple[int, ...]
    workers: tuple[WorkerStatus, ...]


class ListenerStatus(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    address: str


class CompanionStatus(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    state: str
    """That of its process, or `waiting`: it died, and is started again later."""
    runs: str
    generation: int | None = None
    pid: int = 0
    age_seconds: float = 0.0
    restarts: int = 0
    """In a row; one that lives for a while has none."""


class MovesStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Live connections, over all workers since the master started. `waiting`: now."""

    moved: int = 0
    waiting: int = 0
    adopted: int = 0
    refused: int = 0


class StatusAnswer(msgspec.Struct, frozen=True, tag_field="type", tag="status-answer", kw_only=True):
    name: str
    pid: int
    release: str
    age_seconds: float
    is_stopping: bool
    live: int | None
    previous: int | None
    listeners: tuple[ListenerStatus, ...]
    generations: tuple[GenerationStatus, ...]
    last_verdict: Answer | None
    moves: MovesStatus
    dropped_log_lines: int
    open_fds: int
    companions: tuple[CompanionStatus, ...] = ()


AnyAnswer = Answer | StatusAnswer
