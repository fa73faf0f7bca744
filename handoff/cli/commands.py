"""All commands, and how an error leaves the process."""

from __future__ import annotations

import sys

import click

from handoff.cli.check import check
from handoff.cli.operate import reload, rollback, scale, stop
from handoff.cli.plugins import Commands
from handoff.cli.run import run
from handoff.cli.show import ps, status
from handoff.errors import ExitCode, HandoffError
from handoff.version import __version__


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="handoff")
def handoff() -> None:
    """Serve a Python app and deploy it at any moment, under full load, without a client noticing."""


for command in (run, reload, rollback, scale, stop, status, ps, check):
    handoff.add_command(command)


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
