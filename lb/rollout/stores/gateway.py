"""etcd's JSON gateway: requests over HTTP to one of several endpoints, to another where that fails, bounded in time.

https://etcd.io/docs/v3.4/dev-guide/api_grpc_gateway/: bytes in base64, 64-bit integers as strings, no zeros.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import msgspec

from lb.rollout.stores.access import PASSWORD_VARIABLE, USER_VARIABLE, Access, Endpoint
from lb.rollout.stores.base import StoreError, one_line
from lb.rollout.stores.timed import connected

TIMEOUT_SECONDS = 10.0
"""For a request, with all that is tried for it: an election takes 1 to 2 s."""
ATTEMPT_SECONDS = 3.0
"""For one endpoint; less where there are many."""
PAUSE_SECONDS = 0.1
"""Between two rounds through all endpoints."""
MAXIMUM_ANSWER_BYTES = 128 * 1024 * 1024
"""Of a part of a list, with the largest values."""
MAXIMUM_LINE_BYTES = 16 * 1024 * 1024
"""Of a stream."""

_INVALID_ARGUMENT, _UNAUTHENTICATED = 3, 16
_PASSING = (1, 4, 8, 10, 14)
"""gRPC: cancelled, deadline exceeded, resource exhausted, aborted, unavailable."""
_STALE = ("auth token", "user name is empty", "revision of auth store")
"""In what etcd says where it wants a new login."""
_NONSENSE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Header(msgspec.Struct, frozen=True):
    cluster_id: int
    revision: int = 0


class HasHeader(Protocol):
    """As all answers of etcd: what is without it is none."""

    @property
    def header(self) -> Header: ...


class Answered(msgspec.Struct, frozen=True):
    header: Header


T = TypeVar("T", bound=HasHeader)


class Refusal(Exception):
    """etcd says no, and would say so again. `code`: gRPC's."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Refused(msgspec.Struct, frozen=True):
    message: str = ""
    error: str = ""
    code: int = 0


class _LoggedIn(Answered, frozen=True):
    token: str


class _Failed(Exception):
    """An attempt. `is_sent`: it may have been carried out. `may_pass`: another moment may be better."""

    def __init__(self, why: str, *, is_sent: bool, may_pass: bool) -> None:
        super().__init__(why)
        self.is_sent = is_sent
        self.may_pass = may_pass


class _Connection(http.client.HTTPConnection):
    """`deadline`: of all that it does."""

    def __init__(self, endpoint: Endpoint, access: Access, deadline: float) -> None:
        super().__init__(endpoint.host, endpoint.port)
        self._tls = access.tls
        self._deadline = deadline

    def connect(self) -> None:
        self.sock = connected(self.host, self.port, self._deadline, self._tls)


class Gateway:
    """Has a connection for each request. Threads may use it at once."""

    def __init__(self, access: Access, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._access = access
        self._timeout_seconds = timeout_seconds
        self._attempt_seconds = min(ATTEMPT_SECONDS, timeout_seconds / (len(access.endpoints) + 0.5))
        self._first = 0
        """Where an answer came from last."""
        self._token: str | None = None
        self._cluster: int | None = None
        self._closed = threading.Event()
        self._streams: set[socket.socket] = set()

    def close(self) -> None:
        """Streams end."""
        self._closed.set()
        for one in list(self._streams):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def pause(self, seconds: float = PAUSE_SECONDS) -> None:
        self._closed.wait(seconds)

    def error(self, why: str) -> StoreError:
        return StoreError(f"store {self._access}: {why}")

    def ask(self, path: str, body: dict[str, Any], kind: type[T], *, may_repeat: bool = True) -> T:
        """`may_repeat`: carried out twice it is as good. Raises Refusal, StoreError."""
        data = msgspec.json.encode(body)
        deadline = time.monotonic() + self._timeout_seconds
        problems: dict[Endpoint, _Failed] = {}
        while True:
            may_pass = False
            for index in self._order():
                endpoint = self._access.endpoints[index]
                if self._closed.is_set():
                    raise self.error("was closed")
                try:
                    answer = self._ask_one(endpoint, path, data, kind, deadline)
                except _Failed as failed:
                    may_pass = may_pass or failed.may_pass
                    if endpoint not in problems or time.monotonic() < deadline:
                        problems[endpoint] = failed
                    if failed.is_sent and not may_repeat:
                        text = f"{endpoint}: {failed}; it is not known whether the change was made: look"
                        raise self.error(text) from None
                else:
                    self._first = index
                    return answer
                if time.monotonic() >= deadline:
                    break
            if not may_pass or time.monotonic() >= deadline:
                raise self.error(_told(problems)) from None
            self.pause()

    def wait_for_line(
        self, path: str, body: dict[str, Any], seconds: float, is_it: Callable[[bytes], bool | None]
    ) -> bool:
        """Until a line of a stream is what is waited for (None: it is not, False: give up). False: none was."""
        connection = _Connection(self._access.endpoints[self._first], self._access, time.monotonic() + seconds)
        try:
            connection.connect()
            assert connection.sock is not None
            self._streams.add(connection.sock)
            connection.request("POST", path, msgspec.json.encode(body), self._headers())
            response = connection.getresponse()
            found = None if response.status == 200 else False
            while found is None and not self._closed.is_set():
                line = response.readline(MAXIMUM_LINE_BYTES)
                found = is_it(line) if line.endswith(b"\n") else False
            return bool(found)
        except (OSError, http.client.HTTPException, *_NONSENSE):
            return False  # the next ordinary request tells what is wrong
        finally:
            if connection.sock is not None:
                self._streams.discard(connection.sock)
            connection.close()

    def _order(self) -> list[int]:
        count = len(self._access.endpoints)
        return [(self._first + step) % count for step in range(count)]

    def _ask_one(self, endpoint: Endpoint, path: str, data: bytes, kind: type[T], deadline: float) -> T:
        """Raises Refusal, StoreError, _Failed."""
        deadline = min(deadline, time.monotonic() + self._attempt_seconds)
        if self._access.user and self._token is None:
            self._log_in(endpoint, deadline)
        try:
            return self._decoded(self._post(endpoint, path, data, deadline), kind)
        except Refusal as refusal:
            if not _wants_login(refusal):
                raise
            if not self._access.user:
                text = f"{one_line(refusal)}: it wants a user; set {USER_VARIABLE} and {PASSWORD_VARIABLE}"
                raise self.error(text) from None
        self._log_in(endpoint, deadline)
        return self._decoded(self._post(endpoint, path, data, deadline), kind)

    def _log_in(self, endpoint: Endpoint, deadline: float) -> None:
        self._token = None
        body = msgspec.json.encode({"name": self._access.user, "password": self._access.password})
        try:
            answer = self._post(endpoint, "/v3/auth/authenticate", body, deadline)
        except Refusal as refusal:
            text = f"user {self._access.user}: {one_line(refusal)}; see {USER_VARIABLE} and {PASSWORD_VARIABLE}"
            raise self.error(text) from None
        except _Failed as failed:  # nothing was asked for yet
            raise _Failed(str(failed), is_sent=False, may_pass=failed.may_pass) from None
        token = self._decoded(answer, _LoggedIn).token
        if not token.isascii() or not token.isprintable():
            raise _Failed("a login that cannot be used", is_sent=False, may_pass=False)
        self._token = token

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self._token is not None:
            headers["Authorization"] = self._token
        return headers

    def _post(self, endpoint: Endpoint, path: str, data: bytes, deadline: float) -> bytes:
        """The body of an answer that is 200. Raises Refusal, _Failed."""
        connection = _Connection(endpoint, self._access, deadline)
        try:
            try:
                connection.connect()
            except OSError as error:
                raise _Failed(_shown(error), is_sent=False, may_pass=False) from None
            try:
                connection.request("POST", path, data, self._headers())
                response = connection.getresponse()
                content = response.read(MAXIMUM_ANSWER_BYTES + 1)
            except http.client.RemoteDisconnected:
                hint = "" if self._access.tls is not None else "; does it speak TLS? add ?tls=true"
                raise _Failed(f"closed the connection without an answer{hint}", is_sent=True, may_pass=True) from None
            except (OSError, http.client.HTTPException) as error:
                raise _Failed(_shown(error), is_sent=True, may_pass=True) from None
        finally:
            connection.close()
        if len(content) > MAXIMUM_ANSWER_BYTES:
            raise _Failed(f"an answer of more than {MAXIMUM_ANSWER_BYTES} bytes", is_sent=True, may_pass=False)
        if response.status != 200:
            raise _refused(response.status, content)
        return content

    def _decoded(self, content: bytes, kind: type[T]) -> T:
        """Raises _Failed."""
        try:
            answer = msgspec.json.decode(content, type=kind, strict=False)
        except _NONSENSE as error:
            raise _Failed(f"its answer cannot be used ({one_line(error)})", is_sent=True, may_pass=False) from None
        if self._cluster is None:
            self._cluster = answer.header.cluster_id
        if answer.header.cluster_id != self._cluster:
            raise _Failed("belongs to another cluster than the first that answered", is_sent=True, may_pass=False)
        return answer


def _refused(status: int, content: bytes) -> Refusal | _Failed:
    """What an answer says that is not 200."""
    try:
        said = msgspec.json.decode(content, type=_Refused, strict=False)
    except _NONSENSE:
        said = _Refused()
    message = one_line(said.message or said.error)
    if not message:
        return _Failed(f"answers with HTTP status {status}: is it etcd?", is_sent=True, may_pass=status >= 500)
    if said.code in _PASSING and "space exceeded" not in message:
        return _Failed(message, is_sent=True, may_pass=True)
    return Refusal(said.code, message)


def _wants_login(refusal: Refusal) -> bool:
    is_stale = refusal.code in (_UNAUTHENTICATED, _INVALID_ARGUMENT) and any(one in str(refusal) for one in _STALE)
    return is_stale or refusal.code == _UNAUTHENTICATED


def _shown(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return one_line(getattr(error, "strerror", None) or error or type(error).__name__)


def _told(problems: dict[Endpoint, _Failed]) -> str:
    each = "; ".join(f"{endpoint}: {failed}" for endpoint, failed in problems.items())
    if any(failed.is_sent and failed.may_pass for failed in problems.values()):
        return f"does not work: {each}; more than half of its nodes must be up, and reach each other"
    return f"cannot be used: {each}"
