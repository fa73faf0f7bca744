"""What checks trust, in TLS."""

from __future__ import annotations

import os
import ssl

from lb.core.model import Check


class Contexts:
    """Made once for each file, and again when the file is another one."""

    def __init__(self) -> None:
        self._made: dict[tuple[bool, str | None], tuple[tuple[int, int, int], ssl.SSLContext]] = {}

    def of(self, check: Check) -> ssl.SSLContext:
        """Reads the file, which is small. Raises OSError, of which ssl.SSLError is one."""
        key = check.verify, check.ca
        stamp = _stamp(check.ca)
        made = self._made.get(key)
        if made is None or made[0] != stamp:
            made = self._made[key] = (stamp, context_of(check))
        return made[1]


def context_of(check: Check) -> ssl.SSLContext:
    """Raises OSError, of which ssl.SSLError is one."""
    if check.verify:
        return ssl.create_default_context(cafile=check.ca)
    made = ssl.create_default_context()
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    return made


def _stamp(path: str | None) -> tuple[int, int, int]:
    if path is None:
        return 0, 0, 0
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns
