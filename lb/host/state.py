"""What a host remembers of deployments: per service the highest fencing token, and what became of each operation.

STATE/SERVICE/lock, token, operations/ID/: see `Operation`. Directories are 0700, files 0600.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from handoff.errors import ExitCode, HandoffError, UsageError
from handoff.option_table import is_service_name
from lb.control.files import write_atomically
from lb.host.operation import Operation, make_directory, state_error, wait_for_lock

STATE_VARIABLE = "HANDOFF_HOST_STATE"
_OPERATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+/-]{0,127}", re.ASCII)
MAXIMUM_TOKEN = 2**63 - 1


def state_root(environ: Mapping[str, str], uid: int) -> Path:
    """Where the state of this user's deployments lies: `$HANDOFF_HOST_STATE`, /var/lib/handoff/host, or XDG's place."""
    chosen = environ.get(STATE_VARIABLE, "")
    if chosen:
        if not chosen.startswith("/"):
            raise UsageError(f"{STATE_VARIABLE}={chosen}: is no absolute path; give one")
        return Path(chosen)
    if uid == 0:
        return Path("/var/lib/handoff/host")
    base = environ.get("XDG_STATE_HOME", "")
    if base.startswith("/"):  # XDG Base Directory Specification: others are to be ignored
        return Path(base) / "handoff" / "host"
    if environ.get("HOME", "").startswith("/"):
        return Path(environ["HOME"]) / ".local" / "state" / "handoff" / "host"
    raise HandoffError(f"state directory: neither ${STATE_VARIABLE} nor $XDG_STATE_HOME nor $HOME is set; set one")


def prepared_root(environ: Mapping[str, str], uid: int) -> Path:
    """The same, made where it is not there yet. Raises HandoffError if others than this user can change it."""
    root = state_root(environ, uid)
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        make_directory(root)
        status = os.lstat(root)
    except OSError as error:
        raise state_error(root, error) from error
    if not stat.S_ISDIR(status.st_mode):
        raise HandoffError(f"state directory {root}: is not a directory; remove it or set ${STATE_VARIABLE}")
    if status.st_uid != uid:
        text = f"belongs to uid {status.st_uid}, we are uid {uid}; remove it or set ${STATE_VARIABLE}"
        raise HandoffError(f"state directory {root}: {text}")
    if status.st_mode & 0o077:
        raise HandoffError(f"state directory {root}: others can look into it; chmod it to 0700")
    return root


class ServiceState:
    """The state of one service. What changes it is done inside `locked()`."""

    def __init__(self, root: Path, name: str) -> None:
        if not is_service_name(name):
            raise UsageError(f"service name {name!r}: is none; use up to 64 letters, digits and . _ -")
        self.name = name
        self.path = root / name
        self._operations = self.path / "operations"
        self._token = self.path / "token"

    @contextlib.contextmanager
    def locked(self, deadline: float) -> Iterator[None]:
        """Nobody else is in here. Held for moments only. Raises HandoffError: LOCKED at the (monotonic) deadline."""
        try:
            for directory in (self.path, self._operations):
                make_directory(directory)
            fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise state_error(self.path, error) from error
        try:
            if not wait_for_lock(fd, fcntl.LOCK_EX, deadline):
                text = f"{self.path / 'lock'} is held by another handoff host; see what it waits for"
                raise HandoffError(f"service {self.name}: {text}", ExitCode.LOCKED)
            yield
        except OSError as error:
            raise state_error(self.path, error) from error
        finally:
            os.close(fd)

    def admit(self, token: int) -> None:
        """Refuse a token that is older than the newest; a newer one is on the disk when this returns."""
        highest = self._highest_token()
        if token < highest:
            text = f"token {token} is older than {highest}, which this host has seen: another deployer has the lock"
            raise HandoffError(f"service {self.name}: is fenced: {text}", ExitCode.ABORTED)
        if token > highest:
            write_atomically(self._token, f"{token}\n".encode(), is_durable=True)

    def _highest_token(self) -> int:
        try:
            text = self._token.read_text("ascii").strip()
        except FileNotFoundError:
            return 0
        except UnicodeDecodeError:
            text = ""
        if not text.isdigit():
            raise HandoffError(f"{self._token}: holds no token; write the highest that was used into it")
        return int(text)

    def operation(self, operation_id: str) -> Operation:
        """Whether or not there is one yet. Raises UsageError for an id that cannot be."""
        if _OPERATION.fullmatch(operation_id) is None:
            text = "is none; use up to 128 letters, digits and . _ : @ + / -, first a letter or digit"
            raise UsageError(f"operation {operation_id!r}: {text}")
        return Operation(self._operations / operation_id.replace("/", "%"), operation_id)

    def operations(self) -> list[Operation]:
        """All that are kept, the newest first."""
        known = [(record.requested, one) for one in self._kept() if (record := one.request()) is not None]
        return [one for _, one in sorted(known, key=lambda pair: pair[0], reverse=True)]

    def count(self) -> int:
        return len(self._kept())

    def _kept(self) -> list[Operation]:
        names = [name for name in os.listdir(self._operations) if not name.startswith(".")]
        return [Operation(self._operations / name, name.replace("%", "/")) for name in names]

    def runs_under_an_older_token(self, token: int) -> Operation | None:
        """A command of a deployer that has lost its lock meanwhile, and is still at it."""
        for one in self._kept():
            if one.has_result():
                continue
            record = one.request()
            if record is not None and record.token < token and one.is_running():
                return one
        return None

    def forget(self, older_than_seconds: float, keep: int) -> tuple[int, int]:
        """Remove what ended, or was lost, long ago; never one of the newest `keep`. How many are gone, and left."""
        horizon = time.time() - older_than_seconds
        gone = 0
        everything = self.operations()
        for one in everything[keep:]:
            record = one.request()
            if record is not None and record.requested <= horizon and not one.is_running():
                one.remove()
                gone += 1
        for path in self._operations.iterdir():  # what a removal left that did not come to its end
            if path.name.startswith("."):
                shutil.rmtree(path, ignore_errors=True)
        return gone, len(everything) - gone
