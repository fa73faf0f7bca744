"""`handoff lb request`: the admin API for programs that come over ssh. JSON in, JSON out."""

from __future__ import annotations

import sys

import click
import msgspec

from handoff.errors import ExitCode, UsageError
from lb.cli.client import exchange
from lb.cli.options import balancer_options, find_balancer
from lb.core.admin import MAXIMUM_REQUEST_BYTES, Exchange

_WAIT_SECONDS = 24 * 3600.0
"""Who asks ends by itself when it does not want to wait any more."""


@click.command()
@balancer_options
def request(name: str | None, run_dir: str | None) -> int:
    """Ask the admin API: {"method", "path", "body"} on stdin, {"status", "body"} on stdout."""
    written = sys.stdin.buffer.read(2 * MAXIMUM_REQUEST_BYTES + 1)
    if len(written) > 2 * MAXIMUM_REQUEST_BYTES:
        raise UsageError(f"request: more than {2 * MAXIMUM_REQUEST_BYTES} bytes on stdin")
    try:
        asked = msgspec.json.decode(written, type=Exchange)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f'request: stdin: {error}; expected {{"method": …, "path": …, "body": …}}') from None
    answered = exchange(find_balancer(name, run_dir), asked, _WAIT_SECONDS)
    sys.stdout.buffer.write(msgspec.json.encode(answered) + b"\n")
    sys.stdout.buffer.flush()
    return ExitCode.DONE
