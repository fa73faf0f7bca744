"""What the supervisor is told (events) and what it asks for (actions). Every value is frozen."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from handoff.core.generation import CompanionTimings, Timings
from handoff.errors import ExitCode

# --- events ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class ReloadRequested:
    """`request` is the number of whoever waits for the verdict; None where nobody does (a signal)."""

    request: int | None = None
    label: str | None = None
    is_rollback: bool = False


@dataclass(slots=True, frozen=True)
class ScaleRequested:
    """Either the number of workers, or one more or less (TTIN, TTOU)."""

    request: int | None = None
    workers: int | None = None
    change: int = 0


@dataclass(slots=True, frozen=True)
class StopRequested:
    request: int | None = None
    is_now: bool = False


@dataclass(slots=True, frozen=True)
class GenerationStopRequested:
    generation: int
    request: int | None = None
    is_now: bool = False


@dataclass(slots=True, frozen=True)
class Prepared:
    generation: int
    timings: Timings
    label: str


@dataclass(slots=True, frozen=True)
class PrepareFailed:
    generation: int
    reason: str
    exit_code: ExitCode = ExitCode.FAILED


@dataclass(slots=True, frozen=True)
class HelloSaid:
    worker: int


@dataclass(slots=True, frozen=True)
class ProgressSaid:
    worker: int
    step: str


@dataclass(slots=True, frozen=True)
class ReadySaid:
    worker: int


@dataclass(slots=True, frozen=True)
class OpenedSaid:
    worker: int


@dataclass(slots=True, frozen=True)
class ClosedSaid:
    """It drains, and accepts nobody any more."""

    worker: int


@dataclass(slots=True, frozen=True)
class NotedSaid:
    """Something that whoever waits for the verdict should know of."""

    worker: int
    text: str


@dataclass(slots=True, frozen=True)
class LeavingSaid:
    """The worker drains by itself: it was sent TERM, or reached its number of requests."""

    worker: int
    reason: str


@dataclass(slots=True, frozen=True)
class FailedSaid:
    worker: int
    reason: str
    traceback: str = ""
    is_ending: bool = True
    """It ends by itself; else it must be told to."""


@dataclass(slots=True, frozen=True)
class WorkerBroke:
    """Its channel carried something that is not of the protocol; it cannot be trusted any more."""

    worker: int
    reason: str


Said = HelloSaid | ProgressSaid | ReadySaid | OpenedSaid | ClosedSaid | LeavingSaid | FailedSaid | WorkerBroke
"""What workers and companions say."""


@dataclass(slots=True, frozen=True)
class WorkerExited:
    worker: int
    how: str
    post_mortem: str = ""


@dataclass(slots=True, frozen=True)
class CompanionsWanted:
    """For the supervisor of companions: these, of this generation, and no others."""

    generation: int
    timings: Mapping[str, CompanionTimings]


@dataclass(slots=True, frozen=True)
class Tick:
    """Time passed; deadlines may be due."""


Event = (
    ReloadRequested
    | ScaleRequested
    | StopRequested
    | GenerationStopRequested
    | Prepared
    | PrepareFailed
    | Said
    | NotedSaid
    | WorkerExited
    | Tick
)

# --- actions --------------------------------------------------------------------------------------------------------


class Signal(enum.Enum):
    """Signals that the supervisor sends. DUMP makes a worker write its stacks and die of it (SIGABRT)."""

    TERM = "TERM"
    DUMP = "ABRT"
    KILL = "KILL"


@dataclass(slots=True, frozen=True)
class Prepare:
    """Resolve, read and bind for a new generation; answer with Prepared or PrepareFailed.

    `source` is the generation whose pins a rollback takes; None means afresh from what the operator typed.
    """

    generation: int
    source: int | None
    label: str | None


@dataclass(slots=True, frozen=True)
class Spawn:
    worker: int
    generation: int
    slot: int
    companion: str = ""
    yields: bool = False
    """Others serve meanwhile: the processor is theirs first."""


@dataclass(slots=True, frozen=True)
class Open:
    worker: int


@dataclass(slots=True, frozen=True)
class Drain:
    worker: int
    seconds: float


@dataclass(slots=True, frozen=True)
class SendSignal:
    worker: int
    signal: Signal


@dataclass(slots=True, frozen=True)
class Committed:
    generation: int
    previous: int | None


@dataclass(slots=True, frozen=True)
class Unbind:
    """The generation accepts no more: a listener that only it has must refuse clients, not keep them waiting."""

    generation: int


@dataclass(slots=True, frozen=True)
class Forget:
    """The generation is gone: nothing uses its listeners or pins (a rollback may still want the pins)."""

    generation: int


@dataclass(slots=True, frozen=True)
class Verdict:
    """How a request ended. `requests` are all who wait for it."""

    requests: tuple[int, ...]
    exit_code: ExitCode
    message: str
    generation: int | None = None
    traceback: str = ""
    seconds: float = 0.0
    is_reload: bool = True


@dataclass(slots=True, frozen=True)
class LogTransition:
    event: str
    generation: int
    came_from: str
    to: str
    reason: str = ""
    worker: int | None = None
    slot: int | None = None
    companion: str = ""


@dataclass(slots=True, frozen=True)
class LogWarning:
    message: str


@dataclass(slots=True, frozen=True)
class Exit:
    """Everything is gone; the master ends with this code."""

    exit_code: ExitCode
    reason: str = ""


Action = (
    Prepare
    | Spawn
    | Open
    | Drain
    | SendSignal
    | Committed
    | Unbind
    | Forget
    | Verdict
    | LogTransition
    | LogWarning
    | Exit
)


@dataclass(slots=True)
class Pending:
    """The one reload that waits for the present one; everything that asked for it."""

    label: str | None
    is_rollback: bool
    requests: list[int] = field(default_factory=list)
