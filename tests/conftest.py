"""For all tests."""

from __future__ import annotations

from hypothesis import settings

# No test is timed: on a busy machine an example may take any time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
