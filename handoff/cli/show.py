"""Commands that only look: `status` and `ps`."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import click
import msgspec
import psutil

from handoff.cli.client import ask_status
from handoff.cli.options import find_service, service_options, service_root
from handoff.core.control import Status, StatusAnswer, WorkerStatus
from handoff.durations import format_duration
from handoff.errors import ExitCode, HandoffError
from handoff.run_directory import RunDirectory, find_services


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
@click.option("--drain", is_flag=True, help="What holds the workers that drain.")
@service_options
def status(as_json: bool, drain: bool, name: str | None, run_dir: str | None) -> int:
    """Show generations and workers, and how the last reload ended."""
    service = find_service(name, run_dir)
    answer = ask_status(service, Status(drain=drain))
    if as_json:
        click.echo(json.dumps(_with_usage(answer), indent=2))
        return ExitCode.DONE
    from handoff.cli.tables import print_drain, print_status

    if drain:
        print_drain(answer)
    else:
        pids = [worker.pid for worker in _workers(answer)] + [one.pid for one in answer.companions if one.pid]
        print_status(answer, {pid: usage(pid) for pid in pids})
    return ExitCode.DONE


@click.command()
@click.option("--run-dir", metavar="DIR", help="Where services keep their control sockets.")
def ps(run_dir: str | None) -> int:
    """List the processes of all services that run here."""
    root = service_root(run_dir)
    click.echo(f"{'SERVICE':<20} {'PID':>8} {'ROLE':<8} {'GEN':>4} {'SLOT':>4} {'STATE':<10} {'AGE':>8} LABEL")
    for service_name in find_services(root):
        with contextlib.suppress(HandoffError):  # it may be ending, or be somebody else's
            _print_processes(ask_status(RunDirectory(root, service_name), Status()))
    return ExitCode.DONE


def _print_processes(answer: StatusAnswer) -> None:
    state = "stopping" if answer.is_stopping else "running"
    age = format_duration(round(answer.age_seconds))
    click.echo(f"{answer.name:<20} {answer.pid:>8} {'master':<8} {'':>4} {'':>4} {state:<10} {age:>8}")
    for generation in answer.generations:
        for worker in generation.workers:
            age = format_duration(round(worker.age_seconds))
            click.echo(
                f"{answer.name:<20} {worker.pid:>8} {'worker':<8} {generation.generation:>4} {worker.slot:>4} "
                f"{worker.state:<10} {age:>8} {generation.label}".rstrip()
            )
    for one in answer.companions:
        age = format_duration(round(one.age_seconds))
        click.echo(
            f"{answer.name:<20} {one.pid or '':>8} {'companion':<9} {one.generation or '':>3} {'':>4} "
            f"{one.state:<10} {age:>8} {one.name}"
        )


def usage(pid: int) -> dict[str, Any]:
    """Memory (bytes), CPU (seconds) and open fds of a process; what may not be read is None.

    Read here and not in the master: the sizes of a large process take long to add up.
    """
    found: dict[str, Any] = {"rss_bytes": None, "pss_bytes": None, "cpu_seconds": None, "open_fds": None}
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        found["rss_bytes"] = process.memory_info().rss
        times = process.cpu_times()
        found["cpu_seconds"] = round(times.user + times.system, 2)
        with contextlib.suppress(psutil.Error):
            found["open_fds"] = process.num_fds()
        with contextlib.suppress(psutil.Error):
            found["pss_bytes"] = process.memory_full_info().pss
    return found


def _workers(answer: StatusAnswer) -> list[WorkerStatus]:
    return [worker for generation in answer.generations for worker in generation.workers]


def _with_usage(answer: StatusAnswer) -> dict[str, Any]:
    built: dict[str, Any] = msgspec.to_builtins(answer)
    built["usage"] = usage(answer.pid)
    for generation in built["generations"]:
        for worker in generation["workers"]:
            worker["usage"] = usage(worker["pid"])
    for one in built["companions"]:
        one["usage"] = usage(one["pid"]) if one["pid"] else {}
    return built
