"""Files that checks need: what is missing is said before it makes every backend fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

from handoff.errors import UsageError
from lb.control.tls import context_of
from lb.core.model import Balancer, Check


def refuse_missing(balancer: Balancer, shown: str, near: str) -> None:
    """`near`: the directory of relative paths; `shown`: the file as it is called. Raises UsageError."""
    for service, check in _checks(balancer):
        where = f"{shown}: service {service}"
        if check.ca is not None:
            _refuse_bad_ca(where, check, near)
        if check.command and not _is_program(check.command[0], near):
            raise UsageError(
                f"{where}: command {check.command[0]}: there is no such program, or it may not be run; give its path"
            )


def _refuse_bad_ca(where: str, check: Check, near: str) -> None:
    path = os.path.join(near, check.ca or "")
    try:
        context_of(Check(type="tls", ca=path))
    except OSError as error:
        what = error.strerror if error.errno and os.strerror(error.errno) == error.strerror else "holds no certificate"
        raise UsageError(f"{where}: ca {check.ca}: {what}; give a file of certificates in PEM") from None


def _is_program(name: str, near: str) -> bool:
    return shutil.which(os.path.join(near, name) if "/" in name else name) is not None


def _checks(balancer: Balancer) -> Iterator[tuple[str, Check]]:
    for service in balancer.services:
        for check in (service.check, service.agent):
            if check is not None:
                yield service.name, check
