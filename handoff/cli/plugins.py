"""Sub-commands: ours, and those of other distributions (`handoff lb`), found through the entry-point group
`handoff.commands`. Only the one that is called is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import click

from handoff.errors import HandoffError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "handoff.commands"


class Commands(click.Group):
    """`own`: our commands by name, each with its module; where a plug-in has the same name, ours is meant.

    A plug-in that cannot be imported says so when it is called, and never keeps another command from working.
    """

    def __init__(self, *args: Any, own: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own = own

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self.own, *(found.name for found in _plugins())})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.own:
            command: click.Command = getattr(importlib.import_module(self.own[cmd_name]), cmd_name)
            return command
        added = super().get_command(ctx, cmd_name)
        if added is not None:
            return added
        found = next((found for found in _plugins() if found.name == cmd_name), None)
        return None if found is None else _load(found)


def _plugins() -> tuple[EntryPoint, ...]:
    from importlib.metadata import entry_points

    return tuple(entry_points(group=GROUP))


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
