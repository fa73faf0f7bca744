"""`handoff host …`: what a deployer runs on a host."""

from __future__ import annotations

import os
import sys
from typing import Any

import click
import msgspec

from handoff.cli.options import Duration
from lb.host.execute import LOCK_SECONDS, Asked, deadline_of, execute, stop
from lb.host.state import MAXIMUM_TOKEN, ServiceState, prepared_root

STORE_NAME = "rollouts.db"
MAXIMUM_STORE_REQUEST_BYTES = 16 * 1024 * 1024


class _Program(click.Group):
    """A group that is a program of its own, too, when it is called: `python -m lb.host`."""

    def __call__(self, *_: Any, **__: Any) -> None:
        from handoff.cli.commands import run_command

        raise SystemExit(run_command(self))


@click.group(
    cls=_Program, name="host", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
def main() -> None:
    """What deployers run on a host: commands that outlive the session, each once under its id."""


_service = click.option("--service", required=True, metavar="NAME", help="The service that is deployed.")
_token = click.option(
    "--token", required=True, type=click.IntRange(1, MAXIMUM_TOKEN), help="The fencing token of the deployer's lock."
)
_operation = click.option("--operation", required=True, metavar="ID", help="The command's id; one id, one command.")
_timeout = click.option("--timeout", type=Duration(), help="Wait at most so long; default: as it takes.")


@main.command("exec", context_settings={"allow_interspersed_args": False})
@_service
@_token
@_operation
@_timeout
@click.option("--retry-lost", is_flag=True, help="Run it again if nobody knows what became of it.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(
    service: str, token: int, operation: str, timeout: float | None, retry_lost: bool, command: tuple[str, ...]
) -> int:
    """Run COMMAND once, detached, and wait for it; a second call joins it, or answers what is kept."""
    asked = Asked(token, operation, command, deadline_of(timeout), retry_lost, os.environ)
    answer = execute(_state_of(service), asked)
    click.echo(msgspec.json.encode(answer))
    return answer.status()


@main.command("stop")
@_service
@_token
@_operation
@_timeout
def stop_(service: str, token: int, operation: str, timeout: float | None) -> int:
    """End a command that runs: TERM to its process group, KILL after 10 s; answers as exec does."""
    answer = stop(_state_of(service), operation, token, deadline_of(timeout))
    click.echo(msgspec.json.encode(answer))
    return answer.status()


@main.command()
@_service
@click.option("--older-than", required=True, type=Duration(), help="Since they were asked for.")
@click.option(
    "--keep", type=click.IntRange(0), default=20, show_default=True, help="Of the newest, whatever their age."
)
def forget(service: str, older_than: float, keep: int) -> None:
    """Forget operations that ended, or were lost, long ago; their ids then name nothing any more."""
    state = _state_of(service)
    with state.locked(deadline_of(LOCK_SECONDS)):
        gone, left = state.forget(older_than, keep)
    click.echo(f"{service}: forgot {gone} operations, kept {left}")


@main.command()
def store() -> None:
    """Keep the journal and the lock of rollouts without a balancer: one request on stdin, its answer on stdout."""
    from lb.rollout.stores import SQLiteStore, answer

    request = sys.stdin.buffer.read(MAXIMUM_STORE_REQUEST_BYTES)
    kept = SQLiteStore(prepared_root(os.environ, os.geteuid()) / STORE_NAME)
    try:
        sys.stdout.buffer.write(answer(kept, request) + b"\n")
        sys.stdout.buffer.flush()
    finally:
        kept.close()


def _state_of(service: str) -> ServiceState:
    return ServiceState(prepared_root(os.environ, os.geteuid()), service)
