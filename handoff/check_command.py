"""`python -P -m handoff.check_command PIDS HOST PORT TARGET SECONDS`: ask a command through its listener.

Old and new workers accept from the same socket. So a connection is made, and only when one of the processes `PIDS` (or
a descendant of theirs) has accepted it the request is sent; one that somebody else has accepted is closed again.
Exit status 0: a good answer; 1: a bad one, and 3: nobody of these was reached, with the reason on standard output.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import time
from collections.abc import Collection, Iterator
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

import psutil

from handoff.core.dialects import CheckStatus
from handoff.version import __version__

_LOOK_SECONDS = 0.005
_AGAIN_SECONDS = 0.02
"""Between two connections: they are nothing to those who get them, but not free."""
_ESTABLISHED = "01"  # net/tcp_states.h
_SHOWN_BYTES = 4096
_SHOWN_CHARACTERS = 300


class _Unanswered(Exception):
    """Why there is no whole answer."""


def main(arguments: list[str]) -> int:
    pids, host, port, target, seconds = arguments
    deadline = time.monotonic() + float(seconds)
    roots = [int(pid) for pid in pids.split(",")]
    try:
        with _reached(roots, (host, int(port)), deadline) as connection:
            if connection is None:
                sys.stdout.write(f"no connection within {float(seconds):g} s came to a worker of this generation")
                return CheckStatus.NOT_REACHED
            status, body = _get(connection, target, deadline)
    except _Unanswered as error:
        sys.stdout.write(str(error) or f"no answer within {float(seconds):g} s")
        return CheckStatus.BAD
    if status >= 400:
        shown = " ".join(body.decode(errors="replace").split())[:_SHOWN_CHARACTERS]
        sys.stdout.write(f"answered {status}: {shown}")
        return CheckStatus.BAD
    return CheckStatus.GOOD


@contextlib.contextmanager
def _reached(roots: Collection[int], address: tuple[str, int], deadline: float) -> Iterator[socket.socket | None]:
    """A connection that one of the processes has accepted; None where none came to them in time."""
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(address, timeout=left)
        except TimeoutError:
            break
        except OSError as error:
            raise _Unanswered(f"cannot be connected to: {error.strerror}") from None
        with connection:
            inode = _accepted(connection, deadline)
            if inode and _is_held(inode, roots):
                yield connection
                return
        time.sleep(_AGAIN_SECONDS)
    yield None


def _accepted(connection: socket.socket, deadline: float) -> int:
    """The inode of the connection's other end, when it was accepted; 0: it was not, until the deadline, or is closed
    already."""
    local, remote = connection.getpeername(), connection.getsockname()
    inode: int | None = 0
    while inode == 0 and time.monotonic() < deadline:
        inode = _inode(local, remote)
        if inode == 0:
            time.sleep(_LOOK_SECONDS)
    return inode or 0


def _inode(local: tuple[str, int], remote: tuple[str, int]) -> int | None:
    """Of the socket between these addresses, as proc_net_tcp(5) has it; before the accept it has none: 0.

    None: it is not open any more.
    """
    wanted = [_shown(local), _shown(remote), _ESTABLISHED]
    with open("/proc/net/tcp6" if ":" in local[0] else "/proc/net/tcp") as table:
        for line in table:
            fields = line.split()
            if fields[1:4] == wanted:
                return int(fields[9])
    return None


def _shown(address: tuple[str, int]) -> str:
    """Words of 32 bits, each as the machine has it in memory."""
    host, port = address[:2]
    packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host.partition("%")[0])
    return "".join(f"{word:08X}" for (word,) in struct.iter_unpack("=I", packed)) + f":{port:04X}"


def _is_held(inode: int, roots: Collection[int]) -> bool:
    for root in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(root)
            if any(_holds(one.pid, inode) for one in (process, *process.children(recursive=True))):
                return True
    return False


def _holds(pid: int, inode: int) -> bool:
    with contextlib.suppress(OSError):  # it has ended, or is another user's
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                if os.readlink(entry.path) == f"socket:[{inode}]":
                    return True
    return False


def _get(connection: socket.socket, target: str, deadline: float) -> tuple[int, bytes]:
    """Status and the beginning of the body of a whole answer. Raises _Unanswered."""
    url = urlsplit(target)
    client = HTTPConnection("localhost")
    client.sock = connection
    headers = {"User-Agent": f"handoff-check/{__version__}", "Accept": "*/*", "Connection": "close"}
    if url.netloc:
        headers["Host"] = url.netloc
    try:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        client.request("GET", (url.path or "/") + (f"?{url.query}" if url.query else ""), headers=headers)
        answer = client.getresponse()
        body = answer.read(_SHOWN_BYTES)
        while answer.read(_SHOWN_BYTES):  # the rest, however long: a command may not like to be cut off
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            connection.settimeout(left)
    except TimeoutError:
        raise _Unanswered from None
    except (OSError, HTTPException, ValueError) as error:
        raise _Unanswered(f"no whole answer: {str(error) or type(error).__name__}") from None
    return answer.status, body


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
