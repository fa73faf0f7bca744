"""`handoff check`: would this configuration and this application load? Nothing is bound or served."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from handoff.addresses import listener_names
from handoff.cli.options import current_directory
from handoff.config import load_service_options
from handoff.description import describe
from handoff.errors import ExitCode
from handoff.inherited import effective_binds
from handoff.resolve import make_launch, resolve, worker_variables
from handoff.run_directory import RunDirectory


@click.command()
@click.argument("app", required=False)
@click.option("--factory", is_flag=True, default=None, help="APP names a function that makes the application.")
@click.option("--chdir", metavar="DIR", help="The application's directory.")
@click.option("--python", metavar="PATH", help="Interpreter. Default: the one beside this command.")
@click.option("--env-file", metavar="FILE", help="Variables for the application.")
@click.option("--config", metavar="FILE", help="Default: handoff.toml in the directory.")
@click.option("--describe", metavar="COMMAND", help="Prints as JSON what handoff.toml would say.")
def check(app: str | None, factory: bool | None, **paths: Any) -> int:
    """Read the configuration and import APP as a worker would, without serving."""
    overrides = {key: value for key, value in (("app", app), ("factory", factory)) if value is not None}
    launch = make_launch(overrides, argv0=sys.argv[0], cwd=current_directory(), environ=os.environ, **paths)
    pins = resolve(describe(launch))
    settings = pins.settings
    if settings.command:
        click.echo(f"{pins.executable}: is there, and the configuration is good; a command cannot be tried further")
        return ExitCode.DONE
    service = load_service_options(launch, pins.directory)
    # It judges what it gets, and touches nothing.
    RunDirectory(Path(service.run_dir or "/run/handoff"), settings.name, service.control_group)
    names = listener_names(effective_binds(settings.binds, [], pins.directory))
    command = [pins.python, "-P", "-m", "handoff.worker.check_import", *names]
    environment = pins.environment | worker_variables(settings.name, 0, settings.label, 0)
    # In a group of its own, Ctrl-C reaches only us; nobody wants to see where the import was.
    done = subprocess.run(
        command,
        cwd=pins.directory,
        env=environment,
        input=msgspec.json.encode(settings),
        process_group=0,
        check=False,
    )
    return ExitCode.DONE if done.returncode == 0 else ExitCode.FAILED
