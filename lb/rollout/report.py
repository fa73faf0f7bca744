"""What people see of a run: plain lines, or bars where somebody sits in front of a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lb.core.rollout.plan import Step
from lb.core.rollout.progress import Record, State

_SHOWN_CHARACTERS = 60


class Report(Protocol):
    def says(self, line: str) -> None: ...

    def begins(self, title: str, steps: Sequence[Step], whole: tuple[int, int]) -> None:
        """A group. `whole`: steps of the run that are done, and all of them."""

    def ended(self, step: Step, record: Record) -> None: ...

    def output(self, step: Step, text: str) -> None:
        """What a command printed that failed; never journalled."""

    def close(self) -> None: ...


class Lines:
    """A line for everything that happens."""

    def says(self, line: str) -> None:
        click.echo(line)

    def begins(self, title: str, steps: Sequence[Step], whole: tuple[int, int]) -> None:
        click.echo(f"{title} ({len(steps)})" if len(steps) > 1 else title)

    def ended(self, step: Step, record: Record) -> None:
        if record.state is State.FAILED:
            click.echo(f"  failed: {record.note}")
        elif record.note:
            click.echo(f"  {record.note}")

    def output(self, step: Step, text: str) -> None:
        for line in text.splitlines()[-20:]:
            click.echo(f"  {step.host or 'here'} | {line if line.isprintable() else ascii(line)}")

    def close(self) -> None:
        pass


class Bars:
    """For a terminal: a bar for the whole run, and one for the group that is being worked on."""

    def __init__(self, console: Console | None = None) -> None:
        self._lines = Lines()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._whole = self._progress.add_task("all steps", total=None)
        self._group = self._progress.add_task("", total=None)
        self._title = ""

    def shows(self, title: str, group: tuple[int, int], whole: tuple[int, int]) -> None:
        """Each: how many are done, and of how many."""
        if title != self._title:
            self._progress.reset(self._group)
            self._title = title
        short = title if len(title) <= _SHOWN_CHARACTERS else f"{title[: _SHOWN_CHARACTERS - 1]}…"
        self._progress.update(self._group, description=escape(short), completed=group[0], total=group[1])
        self._progress.update(self._whole, completed=whole[0], total=whole[1])
        self._progress.start()

    def says(self, line: str) -> None:
        self.close()
        self._lines.says(line)

    def begins(self, title: str, steps: Sequence[Step], whole: tuple[int, int]) -> None:
        self.shows(title, (0, len(steps)), whole)

    def ended(self, step: Step, record: Record) -> None:
        self._progress.advance(self._group)
        if record.state is State.FAILED:
            self._progress.console.print(f"  failed: {record.note}", markup=False, highlight=False)
        else:
            self._progress.advance(self._whole)

    def output(self, step: Step, text: str) -> None:
        self.close()
        self._lines.output(step, text)

    def close(self) -> None:
        """They go on with the next group, if there is one."""
        self._progress.stop()


def made_report() -> Report:
    return Bars() if sys.stdout.isatty() else Lines()
