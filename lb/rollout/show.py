"""Plans, runs and their history as lines of text."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from lb.core.rollout.plan import Plan, Step
from lb.core.rollout.progress import Do, End, Record, Run, State, TurnBack, how_far, what_next
from lb.rollout.stores.base import Holder

_SHOWN_STEPS = 12


def plan_lines(plan: Plan) -> list[str]:
    """A line for each group, and one for each of its steps."""
    lines = []
    for number, group in enumerate(plan, 1):
        lines.append(f"{number:3}. {group.title}{' (after the commit)' if group.is_after_commit else ''}")
        lines += [f"       {_what(step)}" for step in group.steps[:_SHOWN_STEPS]]
        if len(group.steps) > _SHOWN_STEPS:
            lines.append(f"       and {len(group.steps) - _SHOWN_STEPS} more")
    return lines


def run_lines(run: Run, records: Mapping[str, Record], holder: Holder | None) -> list[str]:
    """How far it is."""
    lines = [f"rollout {run.id}: {run.kind} of {run.version} for {run.deploy.service}, {run.deploy.strategy}"]
    lines.append(f"begun {clock(run.began_at)} by {run.who}")
    if run.without:
        lines.append(f"without {', '.join(f'{name} (by {who})' for name, who in run.without.items())}")
    if run.back is not None:
        lines.append(f"on the way back: {run.reason}")
    done, count = how_far(run, records)
    lines.append(f"steps: {done} of {count} done")
    lines += [f"  failed: {one.note}" for one in records.values() if one.state is State.FAILED]
    if run.verdict is not None:
        lines.append(f"{run.verdict.value} {clock(run.ended_at)}{': ' if run.note else ''}{run.note}")
        return lines
    match what_next(run, records):
        case Do(title, _):
            lines.append(f"next: {title}")
        case TurnBack(reason):
            lines.append(f"next: back, because of {reason}")
        case End(verdict, _):
            lines.append(f"next: {verdict.value}")
    if holder is None:
        lines.append("nobody is at work on it; handoff deploy resume, or abort")
    else:
        lines.append(f"{holder.owner} is at work on it since {clock(holder.since)}")
    return lines


def history_table(runs: Sequence[Run]) -> list[str]:
    """The newest first."""
    if not runs:
        return ["no rollout yet"]
    rows = [("BEGAN", "WHAT", "VERSION", "WHO", "SECONDS", "VERDICT")]
    for run in runs:
        seconds = "" if run.ended_at is None else f"{run.ended_at - run.began_at:.0f}"
        verdict = "not finished" if run.verdict is None else run.verdict.value
        rows.append((clock(run.began_at), run.kind, run.version, run.who, seconds, verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]) for row in rows]


def clock(seconds: float | None) -> str:
    """In UTC: people of one rollout sit in many places."""
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(seconds or 0))


def _what(step: Step) -> str:
    subject = step.host or step.pool or ", ".join(step.hosts)
    words = [step.kind.value, subject]
    if step.kind.value == "switch":
        words.append(f"{step.percent} %")
    if step.balancer:
        words.append(f"on {step.balancer}")
    if step.command:
        words.append(f": {step.command}")
    elif step.seconds:
        words.append(
            f"({step.seconds:g} s)" if step.kind.value in ("bake", "keep") else f"(at most {step.seconds:g} s)"
        )
    return " ".join(word for word in words if word)
