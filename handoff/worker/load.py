"""Importing the application: what it is, and, when that fails, why, in one line and with the user's own frames."""

from __future__ import annotations

import asyncio
import difflib
import errno
import functools
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

from handoff.core.messages import cut

_OUR_FILES = (
    "<frozen importlib",
    "uvloop/",  # compiled: its files are named so
    *(os.path.dirname(file) + os.sep for file in (os.path.dirname(__file__), asyncio.__file__)),
)
"""What is above an application's first frame."""

KnownInterface = Literal["asgi", "wsgi", "handoff"]


class BootFailure(Exception):
    """The worker cannot serve. `trace` holds frames of the application, where the fault is in its code."""

    def __init__(self, reason: str, trace: str = "") -> None:
        self.reason = " ".join(reason.split())  # it goes into one line, whatever an exception says
        super().__init__(self.reason)
        self.trace = trace


def load_application(target: str, is_factory: bool) -> Callable[..., Any]:
    """Import `module:attribute`, or call `module:factory()`. Raises BootFailure."""
    module_name, attribute, calls = split_target(target)
    module = _import(target, module_name)
    found: Any = module
    for part in attribute.split("."):
        found = _attribute(target, found, part)
    if is_factory or calls:
        if not callable(found):
            raise BootFailure(f"application {target}: {_kind(found)} is not callable, so it is no factory")
        found = guarded(f"application {target}: the factory failed", found)
    if not callable(found):
        raise BootFailure(f"application {target}: {_kind(found)} is not callable; name the application object")
    return found  # type: ignore[no-any-return]


def split_target(target: str) -> tuple[str, str, bool]:
    """(module, attribute, whether to call it). Raises BootFailure for another form."""
    name, separator, attribute = target.partition(":")
    calls = attribute.endswith("()")
    attribute = attribute.removesuffix("()")
    parts = [*name.split("."), *attribute.split(".")]
    if not separator or not all(part.isidentifier() for part in parts):
        raise BootFailure(f"application {target}: write module:attribute, for example main:app or main:create_app()")
    return name, attribute, calls


def guarded(subject: str, call: Callable[[], Any]) -> Any:
    """Call the user's code; whatever it raises becomes a BootFailure with its traceback."""
    try:
        return call()
    except BootFailure:
        raise
    except SystemExit as error:
        raise BootFailure(f"{subject}: it called sys.exit({error.code!r})", _trace(error)) from None
    except Exception as error:  # the user's code may raise anything; it is reported, not swallowed
        raise failure_of(subject, error) from None


def failure_of(subject: str, error: BaseException) -> BootFailure:
    return BootFailure(f"{subject}: {_describe(error)}", _trace(error))


def interface_of(application: Callable[..., Any]) -> KnownInterface:
    """ASGI, WSGI or main(worker), by what the callable takes. Raises BootFailure where that cannot be told."""
    parameters = _parameters(application)
    match _required(parameters):
        case ["scope"]:
            return "asgi"  # ASGI 2, or a class taking the scope: uvicorn wraps it
        case [_]:
            return "handoff"
        case [_, _]:
            return "wsgi"
        case [_, _, _]:
            return "asgi"
    if is_async(application):
        return "asgi"
    if not parameters:
        raise BootFailure(
            f"application {_origin(application)}: takes nothing; is it a factory? write it with () behind"
        )
    raise BootFailure(f"application {_origin(application)}: cannot tell ASGI from WSGI; say --interface asgi or wsgi")


def is_async(application: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine; also for an instance whose `__call__` is async, and a partial of either."""
    while isinstance(application, functools.partial):
        application = application.func
    return inspect.iscoroutinefunction(application) or inspect.iscoroutinefunction(type(application).__call__)


def takes_only_scope(application: Callable[..., Any]) -> bool:
    """ASGI 2: called with the scope, it gives what takes receive and send."""
    return not is_async(application) and len(_required(_parameters(application))) == 1


def _parameters(application: Callable[..., Any]) -> list[inspect.Parameter]:
    """What it takes; nothing for a builtin that does not tell."""
    try:
        return list(inspect.signature(application).parameters.values())
    except (TypeError, ValueError):
        return []


def _required(parameters: list[inspect.Parameter]) -> list[str]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [one.name for one in parameters if one.default is one.empty and one.kind in positional]


def _import(target: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            text = f"application {target}: no module named {error.name} in {os.getcwd()}; check the name, or --chdir"
            raise BootFailure(text) from None
        raise failure_of(f"application {target}", error) from None
    except SystemExit as error:
        text = f"application {target}: it called sys.exit({error.code!r}) while it was imported"
        raise BootFailure(text, _trace(error)) from None
    except Exception as error:  # the user's code may raise anything; it is reported, not swallowed
        raise failure_of(f"application {target}", error) from None


def _attribute(target: str, found: Any, part: str) -> Any:
    try:
        return getattr(found, part)
    except AttributeError:
        near = difflib.get_close_matches(part, dir(found), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BootFailure(f"application {target}: {_kind(found)} has no attribute {part}{hint}") from None


def _kind(value: object) -> str:
    if isinstance(value, ModuleType):
        return f"module {value.__name__}"
    name = getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else f"a {type(value).__name__}"


def _origin(value: object) -> str:
    """Where it stands, for what has a name."""
    module = getattr(value, "__module__", None)
    return f"{module}:{value.__qualname__}" if module and hasattr(value, "__qualname__") else _kind(value)


def _describe(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        from handoff.worker.ports import foreign_holder  # psutil: a tenth of what a worker imports, for this alone

        return f"{text}; {foreign_holder()}"
    return text


def _trace(error: BaseException) -> str:
    """The traceback from the application's first frame on: not ours, not the import system's, not asyncio's."""
    frames = error.__traceback__
    while frames is not None and _is_ours(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    return cut("".join(traceback.format_exception(type(error), error, frames)).rstrip())


def _is_ours(file: str) -> bool:
    return file.startswith(_OUR_FILES) or file == importlib.__file__


def add_directory(directory: str) -> None:
    """Let the application's directory join the path, as the first place to look; our own modules are loaded."""
    sys.path.insert(0, directory)
