"""Commands that change a running balancer: its controller does it, and answers when it is so in every relay worker."""

from __future__ import annotations

import os
import re
from typing import Any

import click

from handoff.cli.options import Duration
from handoff.env_file import read_small_file
from handoff.errors import ExitCode, UsageError
from handoff.run_directory import RunDirectory
from lb.cli.client import ask_status, send
from lb.cli.options import balancer_options, change_options, find_balancer, wait_options, waiting, who
from lb.config import parse_config
from lb.core.admin import Add, Apply, Drain, Maint, Ready, Remove, Request, Rollback, Switch, Weight
from lb.source import DEFAULT_FILE, split_backend

_NEGATIVE = re.compile(r"-[0-9]+")
_UNTIL = click.option("--until", type=Duration(), metavar="D", help="It is undone after so long.")
_DEADLINE = click.option(
    "--deadline",
    type=Duration(),
    metavar="D",
    help="Then what is left is closed. Default: the service's drain timeout.",
)
_REPLACE = click.option("--wait", type=Duration(), default=0.0, metavar="D", help="For the pool to be healthy.")


@click.command()
@click.argument("server", metavar="SERVICE/SERVER")
@wait_options
@_DEADLINE
@_UNTIL
@change_options
def drain(
    server: str, wait: bool, timeout: float | None, deadline: float | None, until: float | None, **of: Any
) -> int:
    """Send nothing new to a server. With --wait: until it has no connection left."""
    return _change(
        Drain,
        of,
        server=server,
        wait_seconds=waiting(wait, timeout),
        deadline_seconds=deadline,
        until_seconds=until,
    )


@click.command()
@click.argument("server", metavar="SERVICE/SERVER")
@wait_options
@change_options
def ready(server: str, wait: bool, timeout: float | None, **of: Any) -> int:
    """Undo drain, maint and weight of a server. With --wait: until it gets connections."""
    return _change(Ready, of, server=server, wait_seconds=waiting(wait, timeout))


@click.command()
@click.argument("server", metavar="SERVICE/SERVER")
@wait_options
@_UNTIL
@change_options
def maint(server: str, wait: bool, timeout: float | None, until: float | None, **of: Any) -> int:
    """Take a server out: nothing new, no checks, and what it has is closed."""
    return _change(Maint, of, server=server, wait_seconds=waiting(wait, timeout), until_seconds=until)


class _TakesNegative(click.Command):
    """A negative number is an argument, and no option: what is wrong with it is the controller's to say."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.ignore_unknown_options = any(_NEGATIVE.fullmatch(one) for one in args)
        return super().parse_args(ctx, args)


@click.command(cls=_TakesNegative)
@click.argument("server", metavar="SERVICE/SERVER")
@click.argument("weight", type=int, metavar="N")
@change_options
def weight(server: str, weight: int, **of: Any) -> int:
    """Give a server another weight. 0: nothing new, without being drained."""
    return _change(Weight, of, server=server, weight=weight)


@click.command()
@click.argument("pool", metavar="SERVICE/POOL")
@click.argument("server", metavar="[SERVER=]ADDR")
@click.option("--weight", type=int, default=1, show_default=True)
@click.option("--maxconn", type=int, help="Connections at once. Default: any number.")
@click.option("--backup", is_flag=True, help="Only while no other server may get connections.")
@wait_options
@change_options
def add(
    pool: str, server: str, weight: int, maxconn: int | None, backup: bool, wait: bool, timeout: float | None, **of: Any
) -> int:
    """Add a server to a pool. With --wait: until it gets connections."""
    return _change(
        Add,
        of,
        pool=pool,
        **{"name": server, **split_backend(server)},
        weight=weight,
        maxconn=maxconn,
        backup=backup,
        wait_seconds=waiting(wait, timeout),
    )


@click.command()
@click.argument("pool", metavar="SERVICE/POOL")
@click.argument("server", metavar="SERVER")
@_DEADLINE
@wait_options
@change_options
def remove(pool: str, server: str, deadline: float | None, wait: bool, timeout: float | None, **of: Any) -> int:
    """Remove a server from a pool, when its connections have ended. With --wait: until it is gone."""
    name = split_backend(server).get("name", server)
    return _change(Remove, of, pool=pool, name=name, deadline_seconds=deadline, wait_seconds=waiting(wait, timeout))


@click.command()
@click.argument("service")
@click.argument("pool")
@click.option("--revision", type=int, metavar="N", help="Only if the service's revision is still this one.")
@click.option("--percent", type=int, default=100, show_default=True, help="So many of new connections to POOL.")
@_REPLACE
@click.option("--drain-old", is_flag=True, help="Close what the old pool has. Otherwise it stays warm.")
@_DEADLINE
@change_options
def switch(
    service: str,
    pool: str,
    revision: int | None,
    percent: int,
    wait: float,
    drain_old: bool,
    deadline: float | None,
    **of: Any,
) -> int:
    """Send new connections to another pool. Returns when not one goes to the old one any more."""
    return _change(
        Switch,
        of,
        service=service,
        pool=pool,
        revision=revision,
        percent=percent,
        wait_seconds=wait,
        drain_old=drain_old,
        deadline_seconds=deadline,
    )


@click.command()
@click.argument("service")
@_REPLACE
@change_options
def rollback(service: str, wait: float, **of: Any) -> int:
    """Go back to the pool of the revision before."""
    return _change(Rollback, of, service=service, wait_seconds=wait)


@click.command()
@click.argument("file", required=False)
@balancer_options
def apply(file: str | None, name: str | None, run_dir: str | None) -> int:
    """Take up what FILE says about pools, servers, checks and timeouts, in place. A mistake in it changes nothing.

    Without FILE: lb.toml in this directory, else the file that the balancer runs.
    """
    if file is None:
        file = DEFAULT_FILE if os.path.exists(DEFAULT_FILE) else _file_of(find_balancer(name, run_dir))
    text = read_small_file(file, file)
    balancer = parse_config(text, file)
    of = {"name": name or balancer.name, "run_dir": run_dir, "why": ""}
    return _change(Apply, of, text=text, shown=file)


def _file_of(balancer: RunDirectory) -> str:
    """What it runs. Raises UsageError."""
    file = ask_status(balancer).file
    if file is None:
        raise UsageError(f"service {balancer.name}: runs what was typed, and no file; give FILE")
    return file


def _change(kind: type[Request], of: dict[str, Any], **values: Any) -> int:
    """Sends the request to the balancer that the options name, and prints the answer. Returns its exit code."""
    balancer = find_balancer(of["name"], of["run_dir"])
    answer = send(balancer, kind(**values, who=who(), why=of["why"]))
    is_error = answer.exit_code != ExitCode.DONE
    click.echo(f"{balancer.name}: {answer.message}", err=is_error)
    for note in answer.notes:
        click.echo(f"{balancer.name}: note: {note}", err=True)
    return answer.exit_code
