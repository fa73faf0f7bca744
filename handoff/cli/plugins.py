"""Sub-commands of other distributions: `handoff lb`, found through the entry-point group `handoff.commands`."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import NoReturn

import click

from handoff.errors import HandoffError

GROUP = "handoff.commands"


class Commands(click.Group):
    """The commands added to it, and those of plug-ins; where both have a name, ours is meant.

    A plug-in is imported when it is called, or when all commands are listed. One that cannot be imported says so
    when it is called, and never keeps another command from working.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(found.name for found in entry_points(group=GROUP))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        found = next(iter(entry_points(group=GROUP, name=cmd_name)), None)
        return None if found is None else _load(found)


def _load(found: EntryPoint) -> click.Command:
    try:
        command = found.load()
    except (Exception, SystemExit) as error:  # whatever another's module raises while it is imported
        return _broken(found, f"{type(error).__name__}: {error}")
    if not isinstance(command, click.Command):
        return _broken(found, f"{found.value} is a {type(command).__name__} and no click command")
    return command


def _broken(found: EntryPoint, reason: str) -> click.Command:
    """A command that says why it is none; it takes any arguments, so that they are not blamed instead."""
    whose = "an unknown distribution" if found.dist is None else f"{found.dist.name} {found.dist.version}"
    text = f"{found.name}: the plug-in of {whose} cannot be loaded ({reason}); reinstall or remove {whose.split()[0]}"

    def fail(**_ignored: object) -> NoReturn:
        raise HandoffError(text)

    return click.Command(
        found.name,
        callback=fail,
        params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        context_settings={"ignore_unknown_options": True},
        short_help="cannot be loaded: call it to see why",
        add_help_option=False,
    )
