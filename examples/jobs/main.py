"""Workers that fetch their work and listen nowhere: jobs are files in a directory, each is done once.

handoff run main:main --chdir examples/jobs --bind none --workers 2

Put a file into `jobs/` to have it done. A reload waits for the jobs that are being done.
"""

from __future__ import annotations

import os
from pathlib import Path

from handoff import Worker

POLL_SECONDS = 0.2
JOBS, DONE = Path("jobs"), Path("done")


def main(worker: Worker) -> None:
    JOBS.mkdir(exist_ok=True)
    DONE.mkdir(exist_ok=True)
    if not worker.ready():  # waits for the commit; False: this generation will not be live
        return
    print(f"hello, slot {worker.slot} waits for jobs", flush=True)
    while not worker.wait(POLL_SECONDS):  # True: drain, and nothing is half done
        for job in sorted(JOBS.iterdir()):
            if not worker.draining and job.suffix != ".taken":
                do(job, worker)


def do(job: Path, worker: Worker) -> None:
    taken = job.with_name(f"{job.name}.taken")
    try:
        os.rename(job, taken)  # one worker only can do this
    except FileNotFoundError:
        return
    text = taken.read_text()
    (DONE / job.name).write_text(f"{text.upper()} by generation {worker.generation}\n")
    taken.unlink()
