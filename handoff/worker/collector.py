"""The garbage collector of a worker: while it boots it looks seldom, and what the boot has made it never looks through.

A boot makes modules, classes and functions, of which nearly nothing is garbage. Without this, a worker that takes over
thousands of connections would look through all of them several times, and its clients would wait.
"""

import gc

BOOT_THRESHOLD = 50_000
"""Objects that are made until the collector looks; CPython's own is 700 to 2000."""

SERVING_THRESHOLD = 5_000
"""The same, while it serves."""
_PLAIN = gc.get_threshold()


def begin_boot() -> None:
    """As early as possible."""
    gc.set_threshold(BOOT_THRESHOLD, *_PLAIN[1:])


def end_boot() -> None:
    """Everything that serves is there. A threshold that the application has set itself stays, and `gc.disable()`."""
    if gc.get_threshold()[0] == BOOT_THRESHOLD:
        gc.set_threshold(SERVING_THRESHOLD, *_PLAIN[1:])
    if gc.isenabled():
        gc.collect()  # what is garbage already would be kept, with its open files
    gc.freeze()
