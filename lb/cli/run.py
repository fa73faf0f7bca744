"""`handoff lb run` and `handoff lb check`: from what was typed to what `handoff run` takes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from typing import Any, NamedTuple

import click
import msgspec

from handoff.cli.options import Duration, current_directory
from handoff.cli.run import run as run_service
from handoff.config import load_settings
from handoff.errors import ExitCode, HandoffError
from handoff.resolve import clean_environment, make_launch
from handoff.run_directory import RunDirectory, run_directory_root
from lb.core.model import TYPED, Balancer
from lb.describe import describe
from lb.source import DEFAULT_FILE, Source, load, source_options, words

_PASSED = (
    *("run_dir", "label", "stop_timeout", "boot_timeout", "probation", "log_format"),
    *("pidfile", "status_file", "control_group", "metrics"),
)
"""Options that mean the same as those of `handoff run`."""
_OTHER_DEFAULTS = ("drain_timeout", "max_generations")
"""The same, with a default of their own, which is in the description."""

CATCH_UP_SECONDS = 10.0
"""For asking the peers; each of them is given less."""


class Prepared(NamedTuple):
    balancer: Balancer
    directory: str
    """The file's, as typed: relative paths in it are taken from there, and it may lead through a switched link."""
    describe: str
    """The command that describes the service."""
    catch_up: list[str]
    """The command that asks its peers."""


@click.command()
@source_options
@click.option("--drain-timeout", type=Duration(), help="For replaced relay workers' connections. Default 1h.")
@click.option("--max-generations", type=int, help="Alive at once; the oldest is ended first. Default 10.")
def run(**options: Any) -> int:
    """Serve what FILE says, or --listen ADDR --backend ADDR. SIGHUP or `handoff reload` reads it anew."""
    passed = {key: options.pop(key) for key in (*_OTHER_DEFAULTS, *_PASSED)}
    prepared = prepare(Source(**options))
    if prepared.balancer.peers:
        _ask_peers(prepared, passed["run_dir"])
    context = click.get_current_context()
    result: int = context.invoke(run_service, describe=prepared.describe, chdir=prepared.directory, **passed)
    return result


for _option in run_service.params:
    if _option.name in _PASSED:
        run.params.append(_option)


@click.command()
@click.argument("file", default=DEFAULT_FILE)
def check(file: str) -> int:
    """Read FILE as `handoff lb run` would. Nothing is bound or served."""
    balancer = prepare(Source(file=file)).balancer
    backends = sum(len(pool) for service in balancer.services for pool in service.pools.values())
    click.echo(f"{file}: ok, {_count(len(balancer.services), 'service')}, {_count(backends, 'backend')}")
    return ExitCode.DONE


def _ask_peers(prepared: Prepared, run_dir: str | None) -> None:
    """Before anything is bound: what was switched while this balancer was down. Raises HandoffError."""
    name = prepared.balancer.name
    if RunDirectory(run_directory_root(run_dir, os.environ, os.geteuid()), name).is_locked():
        return  # it runs already, and its state is its own; this start will be refused
    try:
        ran = subprocess.run(prepared.catch_up, stdin=subprocess.DEVNULL, timeout=CATCH_UP_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        click.echo("the peers do not answer; going on without them", err=True)
        return
    if ran.returncode == ExitCode.USAGE:
        raise HandoffError("the peers cannot be asked: see above", ExitCode.USAGE)
    if ran.returncode:
        click.echo(f"asking the peers ended with exit code {ran.returncode}; going on without them", err=True)


def prepare(source: Source) -> Prepared:
    """Reads everything once, so that a mistake is told before anything is touched. Raises HandoffError."""
    cwd = current_directory()
    typed = make_launch({}, argv0=sys.argv[0], cwd=cwd, environ=os.environ).directory
    path = None if source.file is None else os.path.join(typed, source.file)
    state = None if source.state is None else os.path.join(typed, source.state)
    absolute = msgspec.structs.replace(source, file=path, state=state)
    launch = make_launch(
        {}, argv0=sys.argv[0], cwd=cwd, environ=os.environ, chdir=typed if path is None else os.path.dirname(path)
    )
    balancer = load(absolute, source.file or TYPED)
    launch = msgspec.structs.replace(launch, described=describe(absolute))
    load_settings(launch, launch.directory, clean_environment(os.environ))
    command = [launch.python, "-P", "-m", "lb.describe", *words(absolute)]
    catch_up = [launch.python, "-P", "-m", "lb.catch_up", *words(absolute)]
    return Prepared(balancer, launch.directory, shlex.join(command), catch_up)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
