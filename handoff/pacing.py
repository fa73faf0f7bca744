"""A process that starts beside workers that serve gives its processor up, again and again, where others want one.

However nice it is: a kernel that preempts at its ticks only (every 4 ms with HZ=250) leaves it the processor until the
next one, and whoever waits there waits that long. One that pauses by itself is out of the way after a fraction of that.
Where nobody else wants the processor it does not pause.
"""

from __future__ import annotations

import sys
import time
from _thread import get_ident

TYPE_CHECKING = False
"""Nothing is imported here that would take its time before the first pause: neither typing nor threading."""
if TYPE_CHECKING:
    from collections.abc import Callable

BURST_SECONDS = 0.0002
"""Of processor time without a pause; the import of one module rarely takes longer than a millisecond."""
PAUSE_SECONDS = 0.002
WAITED_SECONDS = 0.0002
"""Without a processor during a burst: somebody else has it, or a disk is read."""
BUSY_BURSTS = 64
"""So many pauses at least follow: who pauses is preempted seldom, and would think itself alone."""


class Pacer:
    """Stands in `sys.meta_path` as a finder that finds no module, and so learns of each import.

    Belongs to the thread that makes it; in others it does nothing. `until`: by `wall`, the end of all pauses.
    """

    def __init__(
        self,
        until: float,
        cpu: Callable[[], float] = time.thread_time,
        wall: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._thread = get_ident()
        self._until = until
        self._cpu, self._wall, self._sleep = cpu, wall, sleep
        self._cpu_then = 0.0  # the interpreter's own start counts
        self._wall_then = wall()
        self._slept = 0.0
        self._pauses_due = 1

    def find_spec(self, _name: str, _path: object = None, _target: object = None) -> None:
        """importlib.abc.MetaPathFinder: not here."""
        self.pace()

    def pace(self) -> None:
        """Pause if a burst is over and somebody else waits."""
        if get_ident() != self._thread or (cpu := self._cpu()) - self._cpu_then < BURST_SECONDS:
            return
        wall = self._wall()
        if wall > self._until:
            return
        if wall - self._wall_then - (cpu - self._cpu_then) - self._slept > WAITED_SECONDS:
            self._pauses_due = BUSY_BURSTS
        self._cpu_then, self._wall_then, self._slept = cpu, wall, 0.0
        if self._pauses_due:
            self._pauses_due -= 1
            self._slept = PAUSE_SECONDS
            self._sleep(PAUSE_SECONDS)


def begin_pacing(seconds: float) -> None:
    """As early as possible; for so many seconds, at most."""
    pacer = Pacer(time.monotonic() + seconds)
    sys.meta_path.insert(0, pacer)  # of a finder, find_spec is all that is needed
    pacer.pace()


def end_pacing() -> None:
    """The start is over: what is imported from now on is somebody's request."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Pacer)]
