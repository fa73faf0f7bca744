"""The collector of a worker: seldom while it boots, and never over what the boot has made."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from handoff.worker.collector import BOOT_THRESHOLD, SERVING_THRESHOLD

PROGRAM = """
import gc, json, sys
from handoff.worker.collector import begin_application, begin_boot, end_boot

begin_boot()
import asyncio
early = gc.get_freeze_count()
begin_application()
seen = [gc.get_threshold()[0], early > 1000 and not gc.callbacks]
exec(sys.argv[1])
loop = []
loop.append(loop)
end_boot()
seen += [gc.get_threshold()[0], gc.isenabled(), gc.get_freeze_count() > 1000]
seen.append(any(one is loop for one in gc.get_objects()))
print(json.dumps(seen))
"""


def seen(application: str) -> list[object]:
    """The threshold in a boot, and whether handoff's own modules were frozen bit by bit; the threshold after it,
    whether the collector is on, whether something is frozen, and whether it looks at what the boot has made."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, application], capture_output=True, text=True, check=True)
    found: list[object] = json.loads(done.stdout)
    return found


def test_what_a_boot_has_made_is_not_looked_through_again() -> None:
    assert seen("") == [BOOT_THRESHOLD, True, SERVING_THRESHOLD, True, True, False]


@pytest.mark.parametrize(
    ("application", "threshold", "is_enabled"),
    [("gc.set_threshold(123, 4, 5)", 123, True), ("gc.disable()", SERVING_THRESHOLD, False)],
)
def test_what_the_application_has_set_stays(application: str, threshold: int, is_enabled: bool) -> None:
    assert seen(application) == [BOOT_THRESHOLD, True, threshold, is_enabled, True, False]
