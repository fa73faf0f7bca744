"""Commands that change a running service: they wait for what really happened, and exit with its code."""

from __future__ import annotations

import click

from handoff.cli.client import ask_verdict
from handoff.cli.options import Duration, find_service, service_options
from handoff.core.control import Answer, Reload, Request, Rollback, Scale, Stop
from handoff.errors import ExitCode, UsageError
from handoff.option_table import is_service_name

_TIMEOUT = click.option(
    "--timeout", type=Duration(), help="How long to wait for the verdict; default: until it is there."
)
_WAIT = click.option("--wait/--no-wait", default=True, help="Wait for the verdict (default).")


@click.command()
@_WAIT
@click.option("--label", help="Your name for this version.")
@_TIMEOUT
@service_options
def reload(wait: bool, label: str | None, timeout: float | None, name: str | None, run_dir: str | None) -> int:
    """Replace the workers by a new generation with the code and configuration of now."""
    if label is not None and not is_service_name(label):
        raise UsageError(f"--label {label!r}: is none; use up to 64 letters, digits and . _ -")
    return _operate(Reload(label=label, wait=wait), timeout, name, run_dir)


@click.command()
@_WAIT
@_TIMEOUT
@service_options
def rollback(wait: bool, timeout: float | None, name: str | None, run_dir: str | None) -> int:
    """Go back to the generation before: its directory, interpreter, environment and settings, as an ordinary reload.

    While a reload is going on, this aborts it.
    """
    return _operate(Rollback(wait=wait), timeout, name, run_dir)


@click.command()
@click.argument("workers", type=int)
@_TIMEOUT
@service_options
def scale(workers: int, timeout: float | None, name: str | None, run_dir: str | None) -> int:
    """Change the number of workers, and wait until that many accept."""
    return _operate(Scale(workers=workers), timeout, name, run_dir)


@click.command()
@click.option("--now", is_flag=True, help="At once: what is in progress is cut off.")
@click.option("--generation", type=int, metavar="N", help="Only this generation, which must not be the live one.")
@_TIMEOUT
@service_options
def stop(now: bool, generation: int | None, timeout: float | None, name: str | None, run_dir: str | None) -> int:
    """Stop the service: no new connections, what is in progress finishes."""
    return _operate(Stop(now=now, generation=generation), timeout, name, run_dir)


def _operate(request: Request, timeout: float | None, name: str | None, run_dir: str | None) -> int:
    service = find_service(name, run_dir)
    answer = ask_verdict(service, request, timeout)
    _print(service.name, answer)
    return answer.exit_code


def _print(name: str, answer: Answer) -> None:
    is_error = answer.exit_code != ExitCode.DONE
    if answer.traceback:
        click.echo(answer.traceback, err=True)
    seconds = f" ({answer.seconds:.2f} s)" if answer.seconds else ""
    click.echo(f"{name}: {answer.message}{seconds}", err=is_error)
