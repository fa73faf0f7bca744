"""The garbage collector of a worker: while it boots it looks seldom, and what the boot has made it never looks through.

A boot makes modules, classes and functions, of which nearly nothing is garbage. Without this, a worker that takes over
thousands of connections would look through all of them several times, and its clients would wait.
"""

from __future__ import annotations

import gc

OWN_THRESHOLD = 3_000
"""Objects that are made until the collector looks, while handoff imports itself. What is left then is frozen at once:
to look through all of it at the end would take ten times as long as to look at what was just made."""
BOOT_THRESHOLD = 50_000
"""The same, while the application boots; CPython's own is 700 to 2000."""
SERVING_THRESHOLD = 5_000
"""The same, while it serves."""
SERVING_GENERATIONS = 3, 33
"""So many young collections until the middle generation is looked through, and so many of those until all is: with
CPython's own 10 and 10 a worker that takes thousands of connections over once looks through 50,000 objects in one go,
which takes 11 ms. All is looked through as seldom as with those."""
_PLAIN = gc.get_threshold()


def begin_boot() -> None:
    """As early as possible: handoff's own modules come now."""
    gc.set_threshold(OWN_THRESHOLD, *_PLAIN[1:])
    gc.callbacks.append(_freeze)


def begin_application() -> None:
    """What is made from now on is the application's."""
    gc.callbacks.remove(_freeze)
    gc.freeze()
    gc.set_threshold(BOOT_THRESHOLD, *_PLAIN[1:])


def end_boot() -> None:
    """Everything that serves is there. A threshold that the application has set itself stays, and `gc.disable()`."""
    if gc.get_threshold()[0] == BOOT_THRESHOLD:
        gc.set_threshold(SERVING_THRESHOLD, *SERVING_GENERATIONS)
    if gc.isenabled():
        gc.collect()  # what is garbage already would be kept, with its open files
    gc.freeze()


def _freeze(phase: str, _figures: dict[str, int]) -> None:
    if phase == "stop":
        gc.freeze()
