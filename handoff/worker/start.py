"""The first thing that a worker does. Nothing is imported here that could be imported after the first pause."""

from __future__ import annotations

import os

from handoff.pacing import begin_pacing
from handoff.worker.collector import begin_application, begin_boot


def start() -> None:
    """`python -P -c "from handoff.worker.start import start; start()"`, which runpy (`-m`) would begin 5 ms later."""
    paced_seconds = os.environ.pop("HANDOFF_PACED", None)
    if paced_seconds is not None:
        begin_pacing(float(paced_seconds))
    begin_boot()
    from handoff.worker.boot import main

    begin_application()
    main()
