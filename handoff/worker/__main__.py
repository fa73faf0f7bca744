"""`python -P -m handoff.worker`: how the master starts a worker."""

import os

from handoff.pacing import begin_pacing
from handoff.worker.collector import begin_application, begin_boot

if __name__ == "__main__":
    paced_seconds = os.environ.pop("HANDOFF_PACED", None)
    if paced_seconds is not None:
        begin_pacing(float(paced_seconds))
    begin_boot()
    from handoff.worker.boot import main

    begin_application()
    main()
