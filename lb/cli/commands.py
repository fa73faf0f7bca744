"""All commands of the balancer, as one command of `handoff`."""

from __future__ import annotations

from typing import Any

import click

from lb.cli.operate import add, apply, drain, maint, ready, remove, rollback, switch, weight
from lb.cli.request import request
from lb.cli.run import check, run
from lb.cli.show import status


class _Program(click.Group):
    """A group that is a program of its own, too, when it is called: `python -c "from lb.cli import main; main()"`."""

    def __call__(self, *_: Any, **__: Any) -> None:
        from handoff.cli.commands import run_command

        raise SystemExit(run_command(self))


@click.group(
    cls=_Program, name="lb", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
def main() -> None:
    """Balance TCP connections over backends: health checks, drains, blue/green switches, no connection lost."""


for command in (run, check, apply, status, drain, ready, maint, weight, add, remove, switch, rollback, request):
    main.add_command(command)
