"""Small JSON files that are whole at any moment: written beside, and renamed."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

MAXIMUM_BYTES = 64 * 1024 * 1024
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_LOG = logging.getLogger("handoff.lb")
_T = TypeVar("_T")


def write_atomically(path: Path, data: bytes, *, is_durable: bool) -> None:
    """0600. `is_durable`: it is on the disk when this returns. Raises OSError; what was there is there still then."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with open(fd, "wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            if is_durable:
                os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if is_durable:
        sync_directory(path.parent)


def read_decoded(path: Path, decode: Callable[[bytes], _T]) -> _T | None:
    """None where there is no such file, or it cannot be used, which is logged. Raises nothing."""
    try:
        return decode(_read(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        _LOG.warning("%s cannot be read (%s): starting without it", path, error.strerror)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        _LOG.warning("%s cannot be used (%s): starting without it", path, error)
    return None


def boot_id() -> str:
    """The machine's monotonic clock begins anew with each."""
    try:
        return Path(_BOOT_ID).read_text().strip()
    except OSError:
        return ""


def run_id() -> str:
    """Of the master that started this process: another one after a restart of the service."""
    pid = os.getppid()
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return ""
    return f"{pid}:{int(fields[19])}"  # proc(5): when it was started


def _read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAXIMUM_BYTES:
        os.close(fd)
        raise ValueError(f"no file of at most {MAXIMUM_BYTES} bytes")
    with open(fd, "rb") as file:
        return file.read()


def sync_directory(path: Path) -> None:
    """What was made, renamed or removed in it is on the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
