"""Whether settings and application fit: what is refused before a worker serves, and what `handoff check` can tell."""

from __future__ import annotations

import difflib
import inspect
import os
import typing
from collections.abc import Callable
from typing import Any

import msgspec
from uvicorn.config import Config

from handoff.settings import Settings
from handoff.worker.library import ACCEPTS_BY_ITSELF
from handoff.worker.load import BootFailure, is_async


def check_fitting(settings: Settings, application: Callable[..., Any], interface: str) -> None:
    """Raises BootFailure."""
    check_log_file(settings)
    if interface != "handoff":
        check_passed_through(settings)
        return
    if settings.check is not None or settings.warm_up:
        raise BootFailure(
            "check, warm-up: an application with main(worker) checks itself before worker.ready(); remove the option"
        )
    asked = {
        f"proxy-protocol {settings.proxy_protocol}": settings.proxy_protocol != "off",
        "tls-cert": settings.tls_cert is not None,
    }
    for option, is_asked in asked.items():
        if is_asked:
            raise BootFailure(f"{option}: is for ASGI and WSGI applications; leave the option out")
    if not is_async(application) and settings.listen_mode != "shared":
        raise BootFailure(f"listen-mode {settings.listen_mode}: {ACCEPTS_BY_ITSELF}; leave the option out")


def check_log_file(settings: Settings) -> None:
    """logging.config says of a file that is not there: KeyError: 'formatters'. Raises BootFailure."""
    file = settings.log_config
    if file is not None and not os.path.isfile(file):
        raise BootFailure(f"log configuration {file}: is not a file; create it or give another with --log-config")


def check_passed_through(settings: Settings) -> None:
    """uvicorn takes values of any type, and fails with the first request. Raises BootFailure."""
    if not settings.uvicorn:  # as mostly: hints take a while, and each boot would
        return
    known = list(inspect.signature(Config.__init__).parameters)
    kinds = typing.get_type_hints(Config.__init__)
    for key, value in settings.uvicorn.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise BootFailure(f"[uvicorn]: uvicorn has no setting {key}{hint}")
        try:
            msgspec.convert(value, kinds.get(key, object))
        except msgspec.ValidationError as error:
            problem = str(error).partition(" - ")[0].replace("Expected", "expected", 1)
            raise BootFailure(f"[uvicorn]: {key} = {value!r}: uvicorn takes another kind of value: {problem}") from None
        except TypeError:  # a type of Python's, of which msgspec knows nothing
            continue
