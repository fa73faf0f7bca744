"""What several commands share: which balancer is meant, for how long to wait, and who asks."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from typing import Any, TypeVar

import click

from handoff.cli.options import Duration
from handoff.durations import MAX_DURATION_SECONDS
from handoff.errors import UsageError
from handoff.run_directory import RunDirectory, locate, run_directory_root
from lb.source import DEFAULT_FILE, DEFAULT_NAME, name_of

F = TypeVar("F", bound=Callable[..., Any])


def balancer_options(command: F) -> F:
    """`--name` and `--run-dir`: which balancer a command talks to."""
    command = click.option("--run-dir", metavar="DIR", help="Where services keep their control sockets.")(command)
    return click.option("--name", help="The balancer; default: that of lb.toml here, else lb.")(command)


def wait_options(command: F) -> F:
    """`--wait` and `--timeout`, which become `wait_seconds`: see `waiting`."""
    timeout = click.option("--timeout", type=Duration(), help="With --wait: at most so long; default: as it takes.")
    return click.option("--wait", is_flag=True, help="Until it is so.")(timeout(command))


def change_options(command: F) -> F:
    """`--why`, and which balancer."""
    return click.option("--why", default="", metavar="TEXT", help="The reason, for the status.")(
        balancer_options(command)
    )


def find_balancer(name: str | None, run_dir: str | None) -> RunDirectory:
    """The running balancer that a command means. Raises HandoffError (no such service)."""
    if name is None:
        name = name_of(DEFAULT_FILE) if os.path.exists(DEFAULT_FILE) else DEFAULT_NAME
    return locate(name, run_directory_root(run_dir, os.environ, os.geteuid()))


def waiting(wait: bool, timeout: float | None) -> float | None:
    """How long the controller is to wait; None: not at all."""
    if timeout is not None and not wait:
        raise UsageError("--timeout: is for --wait; give both")
    if not wait:
        return None
    return MAX_DURATION_SECONDS if timeout is None else timeout


def who() -> str:
    """The user: behind sudo the one who typed it."""
    name = os.environ.get("SUDO_USER", "")
    if name:
        return name
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"
