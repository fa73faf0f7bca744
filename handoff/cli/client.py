"""A client of the control socket: one request, one answer."""

from __future__ import annotations

import socket
import struct
import time

import msgspec

from handoff.core.control import Answer, AnyAnswer, Request, StatusAnswer
from handoff.errors import ExitCode, HandoffError
from handoff.run_directory import RunDirectory

MAXIMUM_ANSWER_BYTES = 64 * 1024 * 1024
_ANSWERS = msgspec.json.Decoder(AnyAnswer)


def ask(service: RunDirectory, request: Request, timeout_seconds: float | None = None) -> AnyAnswer:
    """Send the request and wait for its answer. Raises HandoffError, TIMED_OUT when it does not come in time."""
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        if timeout_seconds is not None:  # a timeout of Python's would be EAGAIN at once where the queue is full
            seconds, part = divmod(timeout_seconds, 1.0)
            limit = struct.pack("ll", int(seconds), max(1, int(part * 1e6)))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            connection.connect(service.control_socket_path)
            connection.sendall(msgspec.json.encode(request) + b"\n")
            line = _read_line(connection, deadline)
        except (TimeoutError, BlockingIOError):  # the latter from a queue that stayed full (unix(7))
            text = f"service {service.name}: no answer within {timeout_seconds:g} s; it goes on; ask handoff status"
            raise HandoffError(text, ExitCode.TIMED_OUT) from None
        except PermissionError:
            text = (
                f"service {service.name}: no permission for its control socket; be its user or in its --control-group"
            )
            raise HandoffError(text) from None
        except (FileNotFoundError, ConnectionRefusedError):
            text = f"service {service.name}: does not answer (it starts or ends just now); try again"
            raise HandoffError(text, ExitCode.NO_SUCH_SERVICE) from None
        except OSError as error:
            raise HandoffError(f"service {service.name}: {error.strerror}") from None
    try:
        answer: AnyAnswer = _ANSWERS.decode(line)
        return answer
    except msgspec.DecodeError as error:
        raise HandoffError(f"service {service.name}: an answer that this release cannot read: {error}") from None


def ask_status(service: RunDirectory, request: Request) -> StatusAnswer:
    answer = ask(service, request, 10.0)
    if not isinstance(answer, StatusAnswer):
        raise HandoffError(f"service {service.name}: {answer.message}", ExitCode(answer.exit_code))
    return answer


def ask_verdict(service: RunDirectory, request: Request, timeout_seconds: float | None) -> Answer:
    answer = ask(service, request, timeout_seconds)
    if not isinstance(answer, Answer):
        raise HandoffError(f"service {service.name}: gave a status, not a verdict")
    return answer


def _read_line(connection: socket.socket, deadline: float | None) -> bytes:
    received = bytearray()
    while True:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            connection.settimeout(left)
        data = connection.recv(65536)
        if not data:
            raise HandoffError("the service ended before it answered", ExitCode.ABORTED)
        received += data
        if data.endswith(b"\n"):
            return bytes(received)
        if len(received) > MAXIMUM_ANSWER_BYTES:
            raise HandoffError("the service's answer is longer than the limit")
