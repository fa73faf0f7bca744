"""From what was typed at `handoff run` to what one generation is pinned to."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import sys
from collections.abc import Mapping
from typing import Any

import msgspec

from handoff.config import CONFIG_FILE, ServiceOptions, env_file_path, merge_settings, read_config
from handoff.env_file import read_env_file
from handoff.errors import HandoffError, UsageError
from handoff.settings import Launch, Pins, Settings
from handoff.tls_files import read_tls_files

_PATH_OVERRIDES = ("log_config", "tls_cert", "tls_key", "tls_ca", "run_dir", "pidfile", "status_file")


def make_launch(
    overrides: Mapping[str, Any],
    *,
    argv0: str,
    cwd: str,
    environ: Mapping[str, str],
    chdir: str | None = None,
    python: str | None = None,
    config: str | None = None,
    env_file: str | None = None,
    describe: str | None = None,
) -> Launch:
    """What was typed, with paths made absolute from the working directory as typed; no symlink is resolved.

    `argv0` is sys.argv[0]: by default the interpreter is the one beside it, else the one that runs us.
    """
    typed = _directory_as_typed(cwd, environ)
    absolute = dict(overrides)
    for field in _PATH_OVERRIDES:
        if absolute.get(field) is not None:
            absolute[field] = os.path.join(typed, absolute[field])
    return Launch(
        overrides=absolute,
        directory=typed if chdir is None else os.path.join(typed, chdir),
        python=_python_as_typed(python, argv0, typed, environ),
        config=None if config is None else os.path.join(typed, config),
        env_file=None if env_file is None else os.path.join(typed, env_file),
        describe=_words(describe, config),
        environment=clean_environment(environ),
    )


def _words(describe: str | None, config: str | None) -> tuple[str, ...]:
    """The command of --describe, taken apart as a shell does it; no shell is started."""
    if describe is None:
        return ()
    if config is not None:
        raise UsageError("--describe and --config: a service is described by one of the two; leave one out")
    try:
        words = tuple(shlex.split(describe))
    except ValueError as error:
        raise UsageError(f"--describe {describe!r}: expected a command ({str(error).lower()})") from None
    if not words or "\0" in describe:
        raise UsageError(f"--describe {describe!r}: expected a command and its arguments")
    return words


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what was meant for us alone: LISTEN_*, NOTIFY_SOCKET, HANDOFF_*, EINHORN_*, WATCHDOG_…"""
    return {
        key: value
        for key, value in environ.items()
        if not key.startswith(("LISTEN_", "HANDOFF_", "EINHORN_"))
        and key not in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
    }


def worker_variables(name: str, generation: int, label: str, slot: int) -> dict[str, str]:
    """What tells the application who it is; generation 0 is none, only looked at by `handoff check`."""
    return {
        "HANDOFF_NAME": name,
        "HANDOFF_GENERATION": str(generation),
        "HANDOFF_LABEL": label,
        "HANDOFF_SLOT": str(slot),
    }


def resolve(launch: Launch) -> Pins:
    """What a new generation is pinned to: symlinks, environment file and configuration as they are at this moment.

    Raises HandoffError, one line, for whatever of it is missing or wrong.
    """
    directory = resolved_directory(launch.directory)
    python = _resolved_python(launch.python)
    config = read_config(launch, directory)
    env_file = env_file_path(config, launch, directory)
    added = {} if env_file is None else read_env_file(env_file)
    environment = clean_environment({**launch.environment, **added})
    settings = merge_settings(config, launch, directory, environment)
    executable = find_executable(settings.command[0], directory, environment) if settings.command else ""
    pins = Pins(
        directory=directory,
        python=python,
        environment=environment,
        settings=settings,
        executable=executable,
        tls=read_tls_files(settings),
    )
    for name in settings.companions:
        companion_pins(pins, name)
    return pins


def companion_pins(pins: Pins, name: str) -> Pins:
    """What a companion of the generation is pinned to. Raises HandoffError where its command is not there."""
    settings = pins.settings.of_companion(name)
    try:
        executable = find_executable(settings.command[0], pins.directory, pins.environment) if settings.command else ""
    except HandoffError as error:
        raise HandoffError(f"companion {name}: {error.message}") from None
    environment = pins.environment | {"HANDOFF_COMPANION": name}
    return msgspec.structs.replace(pins, settings=settings, executable=executable, environment=environment, tls=None)


def service_changes(
    old_settings: Settings,
    old_options: ServiceOptions,
    new_settings: Settings,
    new_options: ServiceOptions,
    config: str | None = None,
) -> list[str]:
    """One line for each thing that cannot change in a reload and yet did, to refuse the reload with.

    `config` is that of the launch. `handoff.toml: name: cannot change in a reload (web, now api); restart the service`
    """
    pairs = [(key, getattr(old_settings, key), getattr(new_settings, key)) for key in ("name", "listen_mode")]
    for field in ServiceOptions.__struct_fields__:
        pairs.append((field, getattr(old_options, field), getattr(new_options, field)))
    return [
        f"{config or CONFIG_FILE}: {key}: cannot change in a reload"
        f" ({old or 'not set'}, now {new or 'not set'}); restart the service"
        for key, old, new in pairs
        if old != new
    ]


def find_executable(name: str, directory: str, environment: Mapping[str, str]) -> str:
    """The file that a command names: a path from `directory`, or found in the PATH of its environment."""
    if "/" in name:
        path = os.path.join(directory, name)
        if not os.path.isfile(path):
            raise HandoffError(f"command {name}: is no file in {directory}; correct the path or --chdir")
        if not os.access(path, os.X_OK):
            raise HandoffError(f"command {name}: is not executable; chmod +x {path}, or name its interpreter")
        return path
    found = shutil.which(name, path=environment.get("PATH", os.defpath))
    if found is None:
        raise HandoffError(f"command {name}: is not found in PATH; install it or write its path")
    return os.path.join(directory, found)


def _directory_as_typed(cwd: str, environ: Mapping[str, str]) -> str:
    """$PWD, in which a shell keeps the symlinks that one went through, where it is true; else `cwd`."""
    typed = environ.get("PWD", "")
    if not typed.startswith("/"):
        return cwd
    try:
        return typed if os.path.samefile(typed, cwd) else cwd
    except OSError:
        return cwd


def _python_as_typed(python: str | None, argv0: str, directory: str, environ: Mapping[str, str]) -> str:
    if python is not None:
        found = None if "/" in python else _find_in_path(python, directory, environ)
        return found or os.path.join(directory, python)
    command = os.path.join(directory, argv0) if "/" in argv0 else _find_in_path(argv0, directory, environ)
    if command is not None:
        beside = os.path.join(os.path.dirname(command), "python")
        if _is_executable_file(beside):
            return beside
    return sys.executable


def _find_in_path(command: str, directory: str, environ: Mapping[str, str]) -> str | None:
    """Where a shell would find the command, with the symlinks on the way left in."""
    if not command:
        return None
    for entry in environ.get("PATH", os.defpath).split(":"):
        candidate = os.path.join(directory, entry, command)
        if _is_executable_file(candidate):
            return candidate
    return None


def _is_executable_file(path: str) -> bool:
    return os.path.isfile(path) and os.access(path, os.X_OK)


def resolved_directory(path: str) -> str:
    try:
        # Strict: a link that leads nowhere is found here, not later as a confusing ENOENT.
        resolved = os.path.realpath(path, strict=True)
        is_directory = stat.S_ISDIR(os.stat(resolved).st_mode)
    except OSError as error:
        raise HandoffError(f"directory {path}: {_problem(error)}") from None
    _check_text("directory", resolved, "--chdir")
    if not is_directory:
        raise HandoffError(f"directory {path}: is not a directory; give one with --chdir")
    if not os.access(resolved, os.X_OK):
        raise HandoffError(f"directory {path}: no permission to enter it; grant it or give another with --chdir")
    return resolved


def _resolved_python(path: str) -> str:
    """The interpreter, resolved but for its last component, whose link makes a virtual environment what it is."""
    directory, name = os.path.split(path)
    try:
        python = os.path.join(os.path.realpath(directory, strict=True), name)
        os.stat(python)
    except OSError as error:
        raise HandoffError(f"python {path}: {_problem(error, '--python')}") from None
    _check_text("python", python, "--python")
    if not _is_executable_file(python):
        raise HandoffError(f"python {path}: is not an executable file; give an interpreter with --python")
    return python


def _check_text(subject: str, path: str, option: str) -> None:
    """Paths travel as JSON, which is Unicode."""
    try:
        path.encode()
    except UnicodeEncodeError:
        shown = path.encode(errors="backslashreplace").decode()
        raise HandoffError(f"{subject} {shown}: is no UTF-8; rename it or give another with {option}") from None


def _problem(error: OSError, option: str = "--chdir") -> str:
    if isinstance(error, FileNotFoundError):
        return f"does not exist; create it or give another with {option}"
    if isinstance(error, NotADirectoryError):
        return f"leads through a file that is not a directory; give another with {option}"
    return f"cannot be used ({os.strerror(error.errno or 0)}); give another with {option}"
