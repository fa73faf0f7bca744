"""The life of one generation: the workers of one load of code and configuration."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from handoff.core.respawn import Respawn


class GenerationState(enum.Enum):
    PREPARING = "preparing"
    """Paths are resolved, settings read, listeners bound."""
    BOOTING = "booting"
    PROBATION = "probation"
    """All of the first workers are ready; they must survive, and do not accept."""
    OPENING = "opening"
    """Committing: told to accept, not all have confirmed it."""
    LIVE = "live"
    RETIRING = "retiring"
    """A newer one is live; this one's workers still accept, until they are drained one by one."""
    DRAINING = "draining"
    ABORTING = "aborting"
    """It will never be live; its workers are on their way out."""
    GONE = "gone"


class GenerationEvent(enum.Enum):
    PREPARED = "prepared"
    ALL_READY = "all ready"
    SURVIVED = "survived"
    ALL_OPENED = "all opened"
    SUPERSEDED = "superseded"
    RETIRED = "retired"
    FAILED = "failed"
    STOPPED = "stopped"
    EMPTIED = "emptied"


_S, _E = GenerationState, GenerationEvent

GENERATION_TABLE: dict[tuple[GenerationState, GenerationEvent], GenerationState] = {
    (_S.PREPARING, _E.PREPARED): _S.BOOTING,
    (_S.PREPARING, _E.FAILED): _S.ABORTING,
    (_S.BOOTING, _E.ALL_READY): _S.PROBATION,
    (_S.BOOTING, _E.FAILED): _S.ABORTING,
    (_S.PROBATION, _E.SURVIVED): _S.OPENING,
    (_S.PROBATION, _E.FAILED): _S.ABORTING,
    (_S.OPENING, _E.ALL_OPENED): _S.LIVE,
    (_S.OPENING, _E.FAILED): _S.ABORTING,
    (_S.LIVE, _E.SUPERSEDED): _S.RETIRING,
    (_S.LIVE, _E.STOPPED): _S.DRAINING,
    (_S.RETIRING, _E.RETIRED): _S.DRAINING,
    (_S.RETIRING, _E.STOPPED): _S.DRAINING,
    (_S.DRAINING, _E.EMPTIED): _S.GONE,
    (_S.ABORTING, _E.EMPTIED): _S.GONE,
}

STARTING_STATES = frozenset({_S.PREPARING, _S.BOOTING, _S.PROBATION, _S.OPENING})
"""At most one generation is in one of these."""


@dataclass(slots=True, frozen=True)
class Timings:
    """What one generation's settings say about numbers of workers and times (seconds)."""

    workers: int
    surge: int | None
    boot_timeout_seconds: float
    probation_seconds: float
    drain_timeout_seconds: float
    stop_timeout_seconds: float
    max_generations: int


@dataclass(slots=True, frozen=True)
class CompanionTimings:
    """The same of one companion."""

    boot_timeout_seconds: float
    stop_timeout_seconds: float


@dataclass(slots=True)
class GenerationRecord:
    """What the supervisor knows of one generation. `deadline` is monotonic (the end of the probation; of the
    time that old workers have, after the commit, to say that they accept nobody any more)."""

    generation: int
    label: str
    is_rollback: bool
    started_at: float
    requests: list[int] = field(default_factory=list)
    state: GenerationState = GenerationState.PREPARING
    timings: Timings | None = None
    workers_wanted: int = 0
    deadline: float | None = None
    committed_at: float | None = None
    failure: str = ""
    traceback: str = ""
    exit_code: int = 0
    is_verdict_given: bool = False
    is_squeezed: bool = False
    notes: list[str] = field(default_factory=list)
    """For the verdict of a commit."""
    news: str = ""
    """What that verdict will say."""
    respawns: dict[int, Respawn] = field(default_factory=dict)

    @property
    def is_starting(self) -> bool:
        return self.state in STARTING_STATES

    @property
    def wants_workers(self) -> bool:
        """A worker of it that is missing is, or will be, started."""
        return self.is_starting or self.state is GenerationState.LIVE

    @property
    def wave(self) -> int:
        """How many workers must be ready before the commit."""
        assert self.timings is not None
        surge = self.timings.surge
        return self.workers_wanted if surge is None else min(surge, self.workers_wanted)
