"""What people see of a run: plain lines, or bars where somebody sits in front of a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

import click
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from lb.core.rollout.plan import Step
from lb.core.rollout.progress import Record, State


class Report(Protocol):
    def says(self, line: str) -> None: ...

    def begins(self, title: str, steps: Sequence[Step]) -> None: ...

    def ended(self, step: Step, record: Record) -> None: ...

    def output(self, step: Step, text: str) -> None:
        """What a command printed that failed; never journalled."""


class Lines:
    """A line for everything that happens."""

    def says(self, line: str) -> None:
        click.echo(line)

    def begins(self, title: str, steps: Sequence[Step]) -> None:
        click.echo(f"{title} ({len(steps)})" if len(steps) > 1 else title)

    def ended(self, step: Step, record: Record) -> None:
        if record.state is State.FAILED:
            click.echo(f"  failed: {record.note}")
        elif record.note:
            click.echo(f"  {record.note}")

    def output(self, step: Step, text: str) -> None:
        for line in text.splitlines()[-20:]:
            click.echo(f"  {step.host or 'here'} | {line if line.isprintable() else ascii(line)}")


class Bars:
    """For a terminal: one bar for the whole run, the group that is being worked on beside it."""

    def __init__(self) -> None:
        self._lines = Lines()
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._task: TaskID | None = None

    def says(self, line: str) -> None:
        self._end()
        self._lines.says(line)

    def begins(self, title: str, steps: Sequence[Step]) -> None:
        self._end()
        self._task = self._progress.add_task(escape(title), total=len(steps))
        self._progress.start()

    def ended(self, step: Step, record: Record) -> None:
        if self._task is not None:
            self._progress.advance(self._task)
        if record.state is State.FAILED:
            self._progress.console.print(f"  failed: {record.note}", markup=False, highlight=False)

    def output(self, step: Step, text: str) -> None:
        self._end()
        self._lines.output(step, text)

    def _end(self) -> None:
        if self._task is not None:
            self._progress.stop()
            self._progress.remove_task(self._task)
            self._task = None


def made_report() -> Report:
    return Bars() if sys.stdout.isatty() else Lines()
