"""All commands, and how an error leaves the process."""

from __future__ import annotations

import sys

import click

from handoff.cli.plugins import Commands
from handoff.errors import ExitCode, HandoffError
from handoff.version import __version__

_OWN = {
    "check": "handoff.cli.check",
    "ps": "handoff.cli.show",
    "reload": "handoff.cli.operate",
    "rollback": "handoff.cli.operate",
    "run": "handoff.cli.run",
    "scale": "handoff.cli.operate",
    "status": "handoff.cli.show",
    "stop": "handoff.cli.operate",
}


@click.group(cls=Commands, own=_OWN, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="handoff")
def handoff() -> None:
    """Serve a Python app and deploy it at any moment, under full load, without a client noticing."""


def run_command(command: click.Command = handoff) -> int:
    """Run what the command line says; returns the exit code."""
    try:
        result = command.main(standalone_mode=False)
        return int(result) if isinstance(result, int) else ExitCode.DONE
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return ExitCode.USAGE
    except click.ClickException as error:
        _complain(error.format_message())
        return ExitCode.USAGE
    except click.Abort:
        return ExitCode.ABORTED
    except HandoffError as error:
        _complain(error.message)
        return error.exit_code


def _complain(message: str) -> None:
    sys.stderr.write(f"handoff: error: {' '.join(message.split())}\n")
