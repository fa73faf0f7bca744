"""A client of the admin API: HTTP over the unix socket that the controller has in the service's runtime directory."""

from __future__ import annotations

import http.client
import socket
import time
from typing import TypeVar

import msgspec

from handoff.durations import MAX_DURATION_SECONDS
from handoff.errors import ExitCode, HandoffError
from handoff.run_directory import RunDirectory
from lb.core.admin import SOCKET_NAME, Answer, Exchange, Exchanged, Request, Status

ABSENT_SECONDS = 5.0
"""So long a controller may be away: one that died is started again, and a reload replaces it, old before new."""
ANSWER_SECONDS = 30.0
"""For an answer, beyond what the request itself says it waits for."""
MAXIMUM_ANSWER_BYTES = 64 * 1024 * 1024
_POLL_SECONDS = 0.05

T = TypeVar("T")


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout_seconds: float) -> None:
        super().__init__("localhost", timeout=timeout_seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(self._path)
        except BaseException:
            self.close()
            raise


def send(service: RunDirectory, request: Request) -> Answer:
    """Have it done. Raises HandoffError: TIMED_OUT without an answer in time, ABORTED where the controller ended."""
    command = str(type(request).__struct_config__.tag)
    waits = getattr(request, "wait_seconds", None) or 0.0
    asked = Exchange(method="POST", path=f"/v1/{command}", body=msgspec.json.encode(request).decode())
    return _ask(service, asked, Answer, waits)


def ask_status(service: RunDirectory) -> Status:
    return _ask(service, Exchange(method="GET", path="/v1/status"), Status, 0.0)


def exchange(service: RunDirectory, asked: Exchange, waits: float) -> Exchanged:
    """Have it answered as it is. Raises HandoffError as `send` does."""
    limit = min(waits, MAX_DURATION_SECONDS) + ANSWER_SECONDS
    connection = _connected(service, limit)
    body = asked.body.encode()
    try:
        connection.request(asked.method, asked.path, body or None, {"Content-Type": "application/json"} if body else {})
        response = connection.getresponse()
        content = response.read(MAXIMUM_ANSWER_BYTES)
    except TimeoutError:
        text = f"service {service.name}: no answer within {limit:g} s; ask handoff lb status"
        raise HandoffError(text, ExitCode.TIMED_OUT) from None
    except (OSError, http.client.HTTPException):
        text = f"service {service.name}: its controller ended before it answered; ask handoff lb status, and try again"
        raise HandoffError(text, ExitCode.ABORTED) from None
    finally:
        connection.close()
    return Exchanged(status=response.status, body=content.decode(errors="replace"))


def _ask(service: RunDirectory, asked: Exchange, kind: type[T], waits: float) -> T:
    answered = exchange(service, asked, waits)
    try:
        return msgspec.json.decode(answered.body, type=kind)
    except msgspec.DecodeError:
        raise _refusal(service, answered) from None


def _refusal(service: RunDirectory, answered: Exchanged) -> HandoffError:
    """An answer of another kind than the one that belongs to the request: an error, told as an Answer or otherwise."""
    try:
        answer = msgspec.json.decode(answered.body, type=Answer)
    except msgspec.DecodeError:
        reason = http.client.responses.get(answered.status, "")
        text = f"service {service.name}: an answer that this release cannot read: {answered.status} {reason}".rstrip()
        return HandoffError(text)
    return HandoffError(f"service {service.name}: {answer.message}", ExitCode(answer.exit_code))


def _connected(service: RunDirectory, timeout_seconds: float) -> _Connection:
    """Tries for a while where nobody listens, as long as the service runs."""
    deadline = time.monotonic() + ABSENT_SECONDS
    path = str(service.path / SOCKET_NAME)
    while True:
        connection = _Connection(path, timeout_seconds)
        try:
            connection.connect()
            return connection
        except PermissionError:
            text = f"service {service.name}: no permission for its admin socket; be the service's user"
            raise HandoffError(text) from None
        except (FileNotFoundError, ConnectionRefusedError):
            if not service.is_locked():
                text = f"service {service.name}: has just ended"
                raise HandoffError(text, ExitCode.NO_SUCH_SERVICE) from None
            if time.monotonic() > deadline:
                text = (
                    f"service {service.name}: its controller does not answer at {path}; "
                    "is it a balancer? handoff status shows how its companion is"
                )
                raise HandoffError(text, ExitCode.FAILED) from None
        except OSError as error:
            raise HandoffError(f"service {service.name}: {error.strerror}") from None
        time.sleep(_POLL_SECONDS)
