"""`handoff deploy …`: rollouts over many hosts."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import click
import msgspec

from handoff.env_file import read_small_file
from handoff.errors import ExitCode, HandoffError, UsageError
from lb.core.rollout.model import Deploy
from lb.core.rollout.plan import CannotPlan, Plan
from lb.core.rollout.progress import Run, can_turn_back
from lb.core.version_label import is_version
from lb.rollout.config import parse_deploy, with_strategy
from lb.rollout.follow import follow
from lb.rollout.journal import Request
from lb.rollout.report import Bars, Lines, Report, made_report
from lb.rollout.session import Session, opened, owner
from lb.rollout.show import history_table, plan_lines, run_lines
from lb.rollout.stores.base import Locked

DEFAULT_FILE = "deploy.toml"
T = TypeVar("T")

_FILE = click.option("--file", "-f", "file", default=DEFAULT_FILE, metavar="FILE", help=f"Default {DEFAULT_FILE}.")
_STRATEGY = click.option(
    "--strategy", type=click.Choice(["rolling", "blue-green", "canary"]), help="Default: the file's."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="For programs.")
_WITHOUT = click.option(
    "--without-balancer",
    "without",
    multiple=True,
    metavar="ADDRESS",
    help="Leave a dead balancer out, as it is called in the file; repeatable. It is journalled.",
)


class _Program(click.Group):
    """What is no command is the version to roll out. A program of its own, too: `python -m lb.rollout`."""

    def __call__(self, *_: Any, **__: Any) -> None:
        from handoff.cli.commands import run_command

        raise SystemExit(run_command(self))

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            return "start", self.commands["start"], args
        return super().resolve_command(context, args)


@click.group(
    cls=_Program,
    name="deploy",
    subcommand_metavar="VERSION | COMMAND [ARGS]…",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
def main() -> None:
    """Roll a version out over many hosts: handoff deploy VERSION, or one of the commands below."""


@main.command(hidden=True)
@click.argument("version")
@_FILE
@_STRATEGY
@_WITHOUT
@click.option("--yes", is_flag=True, help="Do not ask.")
def start(version: str, file: str, strategy: str | None, without: tuple[str, ...], yes: bool) -> int:
    """Roll the version out."""
    deploy = _read(file, strategy)
    _check_version(version)

    shown: list[Plan] = []

    async def show(session: Session) -> int:
        shown.append((await session.begin(version, without)).plan)
        click.echo("\n".join(plan_lines(shown[0])))
        return ExitCode.DONE

    async def run(session: Session) -> int:
        async with session.locked() as lease:
            begun = await session.begin(version, without)
            if shown and begun.plan != shown[0]:
                raise HandoffError("meanwhile another plan is needed than the one that was shown", ExitCode.REFUSED)
            return (await session.work(lease, begun, is_new=True)).exit_code

    if not yes and sys.stdin.isatty() and sys.stdout.isatty():
        _with_session(deploy, show, without=without)
        click.confirm(f"Roll {version} out?", abort=True)  # without the lock: people may take their time
    return _with_session(deploy, run, made_report(), without)


@main.command()
@click.argument("version")
@_FILE
@_STRATEGY
@_JSON
def plan(version: str, file: str, strategy: str | None, as_json: bool) -> int:
    """Print the steps that a rollout would take, as things stand. Takes none."""
    deploy = _read(file, strategy)
    _check_version(version)

    async def show(session: Session) -> int:
        seen, found = await session.plan(version)
        if as_json:
            _print_json({"seen": seen, "plan": found})
        else:
            click.echo("\n".join(plan_lines(found)))
        return ExitCode.DONE

    return _with_session(deploy, show)


@main.command()
@_FILE
@_JSON
def status(file: str, as_json: bool) -> int:
    """Say how far the newest rollout is; in a terminal look on until it ends, or stands."""

    async def show(session: Session) -> int:
        run = await session.latest()
        if sys.stdout.isatty() and not as_json:
            await follow(session.store, session.journal, run.id, Bars())
            run = await session.latest()
        records = await asyncio.to_thread(session.journal.records, run.id)
        holder = await asyncio.to_thread(session.store.holder, session.journal.lock_name)
        if as_json:
            _print_json({"run": run, "steps": records, "lock": holder and holder._asdict()})
        else:
            click.echo("\n".join(run_lines(run, records, holder)))
        return ExitCode.DONE

    return _with_session(_read(file), show)


@main.command()
@_FILE
def pause(file: str) -> int:
    """Have the deployer stop at its next safe point; resume goes on."""

    async def run(session: Session) -> int:
        if await session.is_at_work():
            return await _ask(session, "pause")
        found = await session.latest()
        said = "nobody is at work on it" if found.verdict is None else found.verdict.value
        click.echo(f"rollout {found.id}: {said}")
        return ExitCode.DONE

    return _with_session(_read(file), run)


@main.command()
@_FILE
@_WITHOUT
def abort(file: str, without: tuple[str, ...]) -> int:
    """Lead the rollout back: by its deployer, or by us where none is at work."""

    async def run(session: Session) -> int:
        try:
            async with session.locked() as lease:
                found = await session.resumable(without)
                records = await asyncio.to_thread(session.journal.records, found.id)
                if found.back is None and not can_turn_back(found, records):
                    raise HandoffError(f"rollout {found.id}: is committed; use rollback", ExitCode.REFUSED)
                return (await session.work(lease, found, is_new=False, aborted_by=owner())).exit_code
        except Locked:
            code = await _ask(session, "abort")
            # Whoever stopped right then has not heard it any more.
            return code if await session.is_at_work() else await run(session)

    return _with_session(_read(file), run, made_report(), without)


@main.command()
@_FILE
@_WITHOUT
def resume(file: str, without: tuple[str, ...]) -> int:
    """Go on with a rollout that was paused, or whose deployer is gone; from any machine."""

    async def run(session: Session) -> int:
        async with session.locked() as lease:
            found = await session.resumable(without)
            return (await session.work(lease, found, is_new=False)).exit_code

    return _with_session(_read(file), run, made_report(), without)


@main.command()
@_FILE
@_STRATEGY
@_WITHOUT
def rollback(file: str, strategy: str | None, without: tuple[str, ...]) -> int:
    """Take back what was committed last: one switch, or the hosts' versions of before."""

    async def run(session: Session) -> int:
        async with session.locked() as lease:
            begun = await session.begin_rollback(without)
            return (await session.work(lease, begun, is_new=True)).exit_code

    return _with_session(_read(file, strategy), run, made_report(), without)


@main.command()
@_FILE
@_JSON
def history(file: str, as_json: bool) -> int:
    """Who rolled out what, when, and how it ended."""

    async def show(session: Session) -> int:
        runs: list[Run] = await asyncio.to_thread(session.journal.runs)
        if as_json:
            _print_json(runs)
        else:
            click.echo("\n".join(history_table(runs)))
        return ExitCode.DONE

    return _with_session(_read(file), show)


@main.command()
@_FILE
@_JSON
def lock(file: str, as_json: bool) -> int:
    """Say who holds the lock, since when and until when."""

    async def show(session: Session) -> int:
        holder = await asyncio.to_thread(session.store.holder, session.journal.lock_name)
        if as_json:
            _print_json(holder and holder._asdict())
        else:
            click.echo("nobody" if holder is None else str(Locked(session.journal.lock_name, holder)))
        return ExitCode.DONE

    return _with_session(_read(file), show)


async def _ask(session: Session, wants: str) -> int:
    run = await session.latest()
    if run.verdict is not None:
        raise HandoffError(f"rollout {run.id}: {run.verdict.value} already", ExitCode.REFUSED)
    await asyncio.to_thread(session.journal.ask, Request(run=run.id, wants=wants, who=owner()))
    click.echo(f"rollout {run.id}: asked to {wants}; see handoff deploy status")
    return ExitCode.DONE


def _read(file: str, strategy: str | None = None) -> Deploy:
    return with_strategy(parse_deploy(read_small_file(file, file), file), strategy)


def _check_version(version: str) -> None:
    if not is_version(version):
        raise UsageError(f"version {version!r}: expected up to 128 letters, digits and . _ + -, not . - + _ first")


def _with_session(
    deploy: Deploy,
    work: Callable[[Session], Awaitable[int]],
    report: Report | None = None,
    without: tuple[str, ...] = (),
) -> int:
    async def run() -> int:
        async with opened(deploy, report or Lines(), without) as session:
            try:
                return await work(session)
            except CannotPlan as error:
                raise HandoffError(str(error), ExitCode.REFUSED) from None

    return asyncio.run(run())


def _print_json(value: Any) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()
