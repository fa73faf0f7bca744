"""`handoff run`: be the master of a service."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from handoff.cli.options import Duration, Surge, current_directory
from handoff.config import load_service_options, load_settings
from handoff.description import describe
from handoff.errors import ExitCode
from handoff.inherited import take_inherited
from handoff.master.limits import raise_fd_limit
from handoff.master.master import serve
from handoff.master.parent import take_notify_address
from handoff.master.signals import undo_inherited
from handoff.resolve import clean_environment, make_launch
from handoff.run_directory import RunDirectory, run_directory_root

_SECONDS = {
    "check_timeout",
    "boot_timeout",
    "probation",
    "drain_timeout",
    "stop_timeout",
    "keep_alive",
    "ready_after",
    "request_timeout",
    "watchdog",
}
_RENAMED = {"bind": "binds", "header": "headers"}
_NOT_SETTINGS = {"chdir", "python", "env_file", "config", "describe"}


class _WithCommand(click.Command):
    """`handoff run [OPTIONS] -- COMMAND ARGS…`: what follows the first `--` is a command, and not ours to read."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            args, command = args[:at], args[at + 1 :]
            if not command:
                raise click.UsageError("nothing follows --; write handoff run -- COMMAND ARGUMENTS")
            ctx.meta[_COMMAND] = tuple(command)
        return super().parse_args(ctx, args)


_COMMAND = "handoff.command"


@click.command(cls=_WithCommand, options_metavar="[OPTIONS]")
@click.argument("app", required=False, metavar="[APP | -- COMMAND ARGS...]")
@click.option("--factory", is_flag=True, default=None, help="APP names a function that makes the application.")
@click.option(
    "--bind",
    "-b",
    multiple=True,
    metavar="[NAME=]ADDR",
    help="HOST:PORT, [V6]:PORT, udp:HOST:PORT, unix:PATH or fd://N; repeatable; or none. "
    "Default 127.0.0.1:8000, or what was inherited.",
)
@click.option("--backlog", type=int, help="Length of the queue of connections. Default 2048.")
@click.option(
    "--listen-mode",
    type=click.Choice(["shared", "reuseport"]),
    help="One socket for all workers (default), or one for each slot, with connections spread evenly.",
)
@click.option("--freebind", is_flag=True, default=None, help="Bind addresses that this machine may not have yet.")
@click.option("--workers", "-w", type=int, help="Number of worker processes. Default 1.")
@click.option("--threads", type=int, help="Threads of a worker with a WSGI application. Default 10.")
@click.option(
    "--dialect",
    type=click.Choice(["auto", "systemd", "server-starter", "einhorn"]),
    help="How a command gets its listeners and says that it is ready. Default auto: all of them.",
)
@click.option("--ready-after", type=Duration(), help="A command that lives so long is ready. Default 1s, see docs.")
@click.option("--watchdog", type=Duration(), help="A command must say WATCHDOG=1 so often. Default never.")
@click.option("--drain-signal", metavar="NAME", help="What asks a command to drain. Default TERM.")
@click.option("--interface", type=click.Choice(["auto", "asgi", "wsgi", "handoff"]), help="Default auto.")
@click.option("--loop", type=click.Choice(["uvloop", "asyncio"]), help="Default uvloop.")
@click.option("--chdir", metavar="DIR", help="The application's directory; symlinks are resolved at each reload.")
@click.option("--python", metavar="PATH", help="Interpreter of the workers. Default: the one beside this command.")
@click.option("--env-file", metavar="FILE", help="Variables for the workers, read at each reload.")
@click.option("--config", metavar="FILE", help="Default: handoff.toml in the directory. The command line wins.")
@click.option("--describe", metavar="COMMAND", help="Prints as JSON what handoff.toml would say; run at each reload.")
@click.option("--name", help="Name of the service. Default: that of the directory.")
@click.option("--label", help="Your name for the first version.")
@click.option("--run-dir", metavar="DIR", help="Where services keep their control sockets.")
@click.option("--pidfile", metavar="PATH", help="Locked for as long as the service runs.")
@click.option("--status-file", metavar="PATH", help="Keeps lines GENERATION:PID of the workers that live.")
@click.option("--control-group", metavar="GROUP", help="Members of this group may control the service, too.")
@click.option("--metrics", metavar="ADDR", help="Answer Prometheus here: HOST:PORT or unix:PATH, path /metrics.")
@click.option("--check", metavar="PATH", help="A new worker must answer this well before it gets clients.")
@click.option("--check-timeout", type=Duration(), help="For the check and each warm-up request. Default 5s.")
@click.option("--warm-up", multiple=True, metavar="PATH", help="Requested before the check; repeatable.")
@click.option("--boot-timeout", type=Duration(), help="Until a worker must be ready. Default 30s.")
@click.option(
    "--probation", type=Duration(), help="What a ready generation must survive before the commit. Default 1s."
)
@click.option("--surge", type=Surge(), help="Replace so many workers at a time. Default all.")
@click.option("--drain-timeout", type=Duration(), help="For a replaced worker's connections. Default 30s.")
@click.option("--stop-timeout", type=Duration(), help="The same when the service stops. Default 30s.")
@click.option("--max-generations", type=int, help="Alive at once; the oldest is squeezed first. Default 3.")
@click.option("--keep-alive", type=Duration(), help="For idle connections. Default 75s.")
@click.option("--request-timeout", type=Duration(), help="For one request, start to end. Default none.")
@click.option("--limit-concurrency", type=int, help="With so many connections or requests a worker answers 503.")
@click.option("--forwarded-allow-ips", metavar="LIST", help="Proxies whose X-Forwarded-* are believed.")
@click.option(
    "--proxy-protocol",
    type=click.Choice(["off", "accept", "require"]),
    help="Whether connections may, or must, begin with a header of the PROXY protocol. Default off.",
)
@click.option(
    "--proxy-from",
    multiple=True,
    metavar="CIDR",
    help="Whose PROXY headers are believed; unix for unix sockets; repeatable. Default loopback and unix.",
)
@click.option("--tls-cert", metavar="FILE", help="Serve TLS with this chain of certificates; read at each reload.")
@click.option("--tls-key", metavar="FILE", help="Its key.")
@click.option("--tls-ca", metavar="FILE", help="Clients must show a certificate signed by one of these.")
@click.option("--root-path", help="The path that the application is mounted under.")
@click.option("--header", multiple=True, metavar="K:V", help="Added to each response; repeatable.")
@click.option("--access-log/--no-access-log", default=None, help="On by default.")
@click.option(
    "--websockets",
    type=click.Choice(["hand-over", "close"]),
    help="In a reload: move, or run on and be closed with 1012 at the drain's deadline (default).",
)
@click.option("--log-format", type=click.Choice(["text", "json"]), help="Default text.")
@click.option("--log-config", metavar="FILE", help="A logging configuration for the workers.")
@click.option("--generation-header", is_flag=True, default=None, help="Add `handoff-generation: N` to each response.")
def run(**options: Any) -> int:
    """Serve APP, written module:attribute or module:factory(), or a COMMAND of any language.

    SIGHUP or `handoff reload` replaces the workers.
    """
    options["command"] = click.get_current_context().meta.get(_COMMAND)
    launch = make_launch(
        _overrides(options),
        argv0=sys.argv[0],
        cwd=current_directory(),
        environ=os.environ,
        **{key: options[key] for key in _NOT_SETTINGS},
    )
    inherited = take_inherited(os.environ, os.getpid())
    notify_address = take_notify_address(os.environ)
    raise_fd_limit()
    undo_inherited()
    launch = describe(launch)
    # Everything that was typed is judged before the service's directory is touched.
    settings = load_settings(launch, launch.directory, clean_environment(os.environ))
    service = load_service_options(launch, launch.directory)
    root = run_directory_root(service.run_dir, os.environ, os.geteuid())
    run_directory = RunDirectory(root, settings.name, service.control_group)
    run_directory.lock()
    try:
        control_socket = Path(run_directory.control_socket_path)
        ended, traceback = serve(launch, service, inherited, control_socket, run_directory.group_id, notify_address)
    finally:
        run_directory.close()
    if ended.exit_code is not ExitCode.DONE:
        if traceback:
            sys.stderr.write(traceback + "\n")
        sys.stderr.write(f"handoff: error: {ended.reason}\n")
    return ended.exit_code


def _overrides(options: dict[str, Any]) -> dict[str, Any]:
    """What was given, under the names of the settings."""
    given: dict[str, Any] = {}
    for key, value in options.items():
        if value is None or value == () or key in _NOT_SETTINGS:
            continue
        field = _RENAMED.get(key, f"{key}_seconds" if key in _SECONDS else key)
        given[field] = None if field == "surge" and value == "all" else value
    if "headers" in given:
        given["headers"] = tuple(_header(text) for text in given["headers"])
    return given


def _header(text: str) -> tuple[str, str]:
    name, separator, value = text.partition(":")
    if not separator:
        raise click.UsageError(f"--header {text!r}: has no colon; write NAME:VALUE")
    return name.strip(), value.strip()
