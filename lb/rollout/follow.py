"""Looking on while somebody else is at work on a run."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from lb.core.rollout.progress import Do, Record, Run, State, how_far, what_next
from lb.rollout.journal import Journal
from lb.rollout.report import Bars
from lb.rollout.stores.base import Store

LOOK_SECONDS = 2.0
"""So often we look whether somebody still is at work."""


async def follow(store: Store, journal: Journal, name: str, bars: Bars) -> None:
    """Show the run until it has its verdict, or nobody is at work on it. Raises HandoffError."""
    records: dict[str, Record] = {}
    after = 0
    try:
        while True:
            run = await asyncio.to_thread(journal.run, name)
            holder = await asyncio.to_thread(store.holder, journal.lock_name)
            if run.verdict is not None or holder is None:
                return
            changed, after = await asyncio.to_thread(journal.changes, name, after, LOOK_SECONDS if after else 0.0)
            records |= changed
            bars.shows(*_progress(run, records))
    finally:
        bars.close()


def _progress(run: Run, records: Mapping[str, Record]) -> tuple[str, tuple[int, int], tuple[int, int]]:
    whole = how_far(run, records)
    title, group = f"{run.kind} of {run.version}", whole
    match what_next(run, records):
        case Do(title, steps):
            at_work = [step for step in steps if step.id in records and records[step.id].state is State.BEGUN]
            members = next((one.steps for one in (*run.plan, *(run.back or ())) if steps[0] in one.steps), steps)
            group = len(members) - len(at_work or steps), len(members)
    return ("back: " if run.back is not None and not title.startswith("back") else "") + title, group, whole
