"""Status for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from handoff.core.control import CompanionStatus, GenerationStatus, StatusAnswer
from handoff.durations import format_duration

_MIB = 1024 * 1024
MINIMUM_WIDTH = 120


def print_status(answer: StatusAnswer, usages: Mapping[int, Mapping[str, Any]]) -> None:
    console = _console()
    addresses = ", ".join(f"{listener.name}={listener.address}" for listener in answer.listeners)
    state = "stopping" if answer.is_stopping else f"generation {answer.live} live" if answer.live else "starting"
    age = format_duration(round(answer.age_seconds))
    console.print(f"{answer.name}: {state}, master pid {answer.pid}, up {age}, handoff {answer.release}", markup=False)
    console.print(f"listeners: {addresses}", markup=False)
    if answer.last_verdict is not None:
        verdict = answer.last_verdict
        console.print(f"last verdict: {verdict.message} ({verdict.seconds:.2f} s)", markup=False)
    moves = answer.moves
    if moves.moved or moves.waiting or moves.adopted or moves.refused:
        console.print(
            f"live connections: {moves.moved} moved, {moves.waiting} waiting, {moves.adopted} adopted, "
            f"{moves.refused} refused"
        )
    if answer.dropped_log_lines:
        console.print(f"log lines dropped: {answer.dropped_log_lines}", markup=False)
    for generation in answer.generations:
        _print_generation(console, generation, usages)
    if answer.companions:
        _print_companions(console, answer.companions, usages)


def _console() -> Console:
    """At least wide enough for the table: a pipe has no width, and a narrow terminal wraps lines by itself."""
    console = Console(highlight=False)
    return console if console.width >= MINIMUM_WIDTH else Console(highlight=False, width=MINIMUM_WIDTH)


def _print_generation(console: Console, generation: GenerationStatus, usages: Mapping[int, Mapping[str, Any]]) -> None:
    label = f" {generation.label}" if generation.label else ""
    console.print(f"\ngeneration {generation.generation}{label}: {generation.state}", markup=False, style="bold")
    console.print(f"  {generation.app} in {generation.directory} with {generation.python}", markup=False)
    if generation.crash_loop_slots:
        slots = ", ".join(map(str, generation.crash_loop_slots))
        console.print(f"  crash loop in slot {slots}: trying slowly; roll back or reload with a fix", style="red")
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for heading in ("slot", "pid", "state", "interface"):
        table.add_column(heading)
    for heading in ("age", "conns", "active", "requests", "RSS MiB", "PSS MiB", "CPU s", "fds"):
        table.add_column(heading, justify="right")
    for worker in generation.workers:
        used = usages.get(worker.pid, {})
        table.add_row(
            str(worker.slot),
            str(worker.pid),
            worker.state,
            worker.interface,
            format_duration(round(worker.age_seconds)),
            str(worker.connections),
            str(worker.in_progress),
            str(worker.requests),
            _mebibytes(used.get("rss_bytes")),
            _mebibytes(used.get("pss_bytes")),
            _shown(used.get("cpu_seconds")),
            _shown(used.get("open_fds")),
        )
    console.print(table)


def _print_companions(
    console: Console, companions: Sequence[CompanionStatus], usages: Mapping[int, Mapping[str, Any]]
) -> None:
    console.print("\ncompanions", style="bold")
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for heading in ("name", "generation", "pid", "state", "runs"):
        table.add_column(heading)
    for heading in ("age", "restarts", "RSS MiB", "CPU s"):
        table.add_column(heading, justify="right")
    for one in companions:
        used = usages.get(one.pid, {})
        cells = (one.name, _shown(one.generation), str(one.pid or "-"), one.state, one.runs)
        numbers = (format_duration(round(one.age_seconds)), str(one.restarts))
        table.add_row(*map(escape, cells), *numbers, _mebibytes(used.get("rss_bytes")), _shown(used.get("cpu_seconds")))
    console.print(table)


def print_drain(answer: StatusAnswer) -> None:
    """What holds each draining worker: peer, path, age."""
    console = _console()
    draining = [
        (generation, worker)
        for generation in answer.generations
        for worker in generation.workers
        if worker.state == "draining"
    ]
    if not draining:
        console.print("nothing drains")
    for generation, worker in draining:
        console.print(
            f"generation {generation.generation} slot {worker.slot} pid {worker.pid}: "
            f"{worker.holds_total} to finish, {worker.connections} connections",
            markup=False,
        )
        for hold in worker.holds:
            age = format_duration(round(hold.age_seconds, 1))
            console.print(f"  {hold.kind:<10} {hold.peer:<22} {age:>8}  {hold.path}", markup=False)


def _mebibytes(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else f"{size_bytes / _MIB:.1f}"


def _shown(value: object) -> str:
    return "-" if value is None else str(value)
