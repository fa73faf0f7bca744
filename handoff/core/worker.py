"""The life of one worker process, as the master sees it."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class WorkerState(enum.Enum):
    STARTING = "starting"
    """Forked; it said nothing yet."""
    BOOTING = "booting"
    """It said hello and loads the application, warms up and checks itself."""
    READY = "ready"
    """It works, and does not accept yet."""
    OPENING = "opening"
    """It was told to accept and has not confirmed it."""
    ACCEPTING = "accepting"
    DRAINING = "draining"
    """It takes nothing new and finishes what it has, under a deadline."""
    STOPPING = "stopping"
    """It was signalled to end; the next step is KILL."""
    KILLED = "killed"
    """SIGKILL is sent; only the exit can follow."""
    EXITED = "exited"


class WorkerEvent(enum.Enum):
    HELLO = "hello"
    READY = "ready"
    OPEN = "open"
    OPENED = "opened"
    DRAIN = "drain"
    STOP = "stop"
    KILL = "kill"
    EXIT = "exit"


_S, _E = WorkerState, WorkerEvent

WORKER_TABLE: dict[tuple[WorkerState, WorkerEvent], WorkerState] = {
    (_S.STARTING, _E.HELLO): _S.BOOTING,
    (_S.STARTING, _E.STOP): _S.STOPPING,
    (_S.STARTING, _E.KILL): _S.KILLED,
    (_S.STARTING, _E.EXIT): _S.EXITED,
    (_S.BOOTING, _E.READY): _S.READY,
    (_S.BOOTING, _E.STOP): _S.STOPPING,
    (_S.BOOTING, _E.KILL): _S.KILLED,
    (_S.BOOTING, _E.EXIT): _S.EXITED,
    (_S.READY, _E.OPEN): _S.OPENING,
    (_S.READY, _E.DRAIN): _S.DRAINING,
    (_S.READY, _E.STOP): _S.STOPPING,
    (_S.READY, _E.KILL): _S.KILLED,
    (_S.READY, _E.EXIT): _S.EXITED,
    (_S.OPENING, _E.OPENED): _S.ACCEPTING,
    (_S.OPENING, _E.DRAIN): _S.DRAINING,
    (_S.OPENING, _E.STOP): _S.STOPPING,
    (_S.OPENING, _E.KILL): _S.KILLED,
    (_S.OPENING, _E.EXIT): _S.EXITED,
    (_S.ACCEPTING, _E.DRAIN): _S.DRAINING,
    (_S.ACCEPTING, _E.STOP): _S.STOPPING,
    (_S.ACCEPTING, _E.KILL): _S.KILLED,
    (_S.ACCEPTING, _E.EXIT): _S.EXITED,
    # Drain never turns back into serving: a confirmation that was under way changes nothing.
    (_S.DRAINING, _E.OPENED): _S.DRAINING,
    (_S.DRAINING, _E.DRAIN): _S.DRAINING,
    (_S.DRAINING, _E.STOP): _S.STOPPING,
    (_S.DRAINING, _E.KILL): _S.KILLED,
    (_S.DRAINING, _E.EXIT): _S.EXITED,
    # What it said before our signal reached it.
    (_S.STOPPING, _E.HELLO): _S.STOPPING,
    (_S.STOPPING, _E.READY): _S.STOPPING,
    (_S.STOPPING, _E.OPENED): _S.STOPPING,
    (_S.STOPPING, _E.KILL): _S.KILLED,
    (_S.STOPPING, _E.EXIT): _S.EXITED,
    (_S.KILLED, _E.HELLO): _S.KILLED,
    (_S.KILLED, _E.READY): _S.KILLED,
    (_S.KILLED, _E.OPENED): _S.KILLED,
    (_S.KILLED, _E.EXIT): _S.EXITED,
}

SERVES_OR_WILL = frozenset({_S.STARTING, _S.BOOTING, _S.READY, _S.OPENING, _S.ACCEPTING})
"""Nobody asked it to leave: it fills its slot."""

MAY_HOLD_CONNECTIONS = frozenset({_S.OPENING, _S.ACCEPTING, _S.DRAINING})


@dataclass(slots=True)
class WorkerRecord:
    """What the supervisor knows of one worker. `deadline` is monotonic; None where only an event can follow."""

    worker: int
    generation: int
    slot: int
    started_at: float
    state: WorkerState = WorkerState.STARTING
    deadline: float | None = None
    step: str = "starting the interpreter"
    failure: str = ""
    traceback: str = ""
    has_accepted: bool = False
    has_closed: bool = False
    """It drains, and said that it accepts nobody any more."""
    companion: str = ""
    """Its name, where this is a companion and not one of the service's workers."""

    @property
    def is_alive(self) -> bool:
        return self.state is not WorkerState.EXITED

    @property
    def fills_slot(self) -> bool:
        return self.state in SERVES_OR_WILL

    @property
    def holds_slot(self) -> bool:
        """It fills its slot, or failed in it: no replacement before the exit, where the crash is counted."""
        return self.fills_slot or (bool(self.failure) and self.is_alive)

    def exit_reason(self, how: str) -> str:
        """What its exit is for people. `how`: its status or signal, in words."""
        text = f"worker {self.worker} (slot {self.slot}) {how}"
        match self.state:
            case WorkerState.STARTING:
                return f"{text} before it said hello; is handoff installed for the interpreter of this generation?"
            case WorkerState.BOOTING:
                return f"{text} while it was {self.step}"
            case WorkerState.READY:
                return f"{text} after it was ready, on probation"
            case _:
                return text
