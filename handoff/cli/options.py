"""What several commands share: types of values, and how a command finds its service."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from handoff.config import load_service_options, service_name
from handoff.durations import parse_duration
from handoff.errors import HandoffError, UsageError
from handoff.resolve import make_launch
from handoff.run_directory import RunDirectory, locate, run_directory_root

F = TypeVar("F", bound=Callable[..., Any])


class Duration(click.ParamType[float]):
    """`30s`, `200ms`, `2m`: seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            return parse_duration(value)
        except UsageError as error:
            raise click.UsageError(f"{_option_name(param)}: {error.message}") from None


class Surge(click.ParamType[int | str]):
    """`all`, or a number of workers."""

    name = "n|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "all":
            return "all"
        if not str(value).isdecimal():
            raise click.UsageError(f'{_option_name(param)}: {value}: is neither a number of workers nor "all"')
        return int(value)


def _option_name(param: click.Parameter | None) -> str:
    return param.opts[-1] if param is not None else "value"


def current_directory() -> str:
    """Where the command was typed. Raises HandoffError when somebody removed it meanwhile, with an old release say."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise HandoffError("current directory: is gone; change to one that exists and try again") from None


def service_options(command: F) -> F:
    """`--name` and `--run-dir`: which service a command talks to."""
    command = click.option("--run-dir", metavar="DIR", help="Where services keep their control sockets.")(command)
    return click.option("--name", help="The service; default: the one of the current directory.")(command)


def find_service(name: str | None, run_dir: str | None) -> RunDirectory:
    """The running service that a command means. Raises HandoffError (no such service)."""
    launch = make_launch(
        {"name": name} if name is not None else {}, argv0=sys.argv[0], cwd=current_directory(), environ=os.environ
    )
    if name is None:
        name = service_name(launch, launch.directory)
    return locate(name, service_root(run_dir))


def service_root(run_dir: str | None) -> Any:
    """The directory of all services: the option, else the configuration of the current directory, else the default."""
    if run_dir is None:
        launch = make_launch({}, argv0=sys.argv[0], cwd=current_directory(), environ=os.environ)
        run_dir = load_service_options(launch, launch.directory).run_dir
    return run_directory_root(run_dir, os.environ, os.geteuid())
