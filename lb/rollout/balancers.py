"""How a deployer asks a balancer: its admin API, over ssh, HTTP or a unix socket.

`ssh://[USER@]HOST[:PORT][?name=NAME]` runs `handoff lb request` there, which asks the socket that only its user may.
`http(s)://HOST:PORT` needs the balancer's token, in HANDOFF_LB_TOKEN or in a file (`?token_file=PATH`). `unix:PATH` is
an admin socket of this machine, `local` or `local:NAME` the balancer of that name here.
"""

from __future__ import annotations

import abc
import asyncio
import http.client
import os
import re
import socket
import ssl
from typing import NamedTuple, Protocol, TypeVar
from urllib.parse import SplitResult, parse_qs, urlsplit

import msgspec

from handoff.errors import HandoffError, UsageError
from handoff.option_table import is_service_name
from handoff.run_directory import locate, run_directory_root
from lb.core.admin import OVERRIDES_PATH, SOCKET_NAME, Answer, Exchange, Exchanged, Request, Status
from lb.core.overrides import Overrides
from lb.rollout.transport import Transport, Unreachable, transport_for
from lb.source import DEFAULT_NAME

MAXIMUM_ANSWER_BYTES = 64 * 1024 * 1024
STATUS_SECONDS = 15.0
TOKEN_VARIABLE = "HANDOFF_LB_TOKEN"
_MAXIMUM_TOKEN_BYTES = 4096

T = TypeVar("T")


class BalancerClient(Protocol):
    """One balancer. Every call is bounded in time."""

    name: str
    """As it is called in the file."""

    async def status(self) -> Status:
        """Raises Unreachable, HandoffError."""

    async def ask(self, request: Request, timeout: float) -> Answer:
        """What the answer's exit code says is not raised. Raises Unreachable: whether it was done is not known then."""

    async def store_call(self, request: bytes, timeout: float) -> bytes:
        """Of the store of rollouts that it keeps."""

    async def aclose(self) -> None: ...


class _Client(abc.ABC):
    """What all ways have in common."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abc.abstractmethod
    async def _exchange(self, asked: Exchange, timeout: float) -> Exchanged:
        """Raises Unreachable."""

    async def status(self) -> Status:
        return self._decoded(await self._exchange(Exchange(method="GET", path="/v1/status"), STATUS_SECONDS), Status)

    async def overrides(self, timeout: float) -> Overrides:
        """What people have changed there. Raises Unreachable, HandoffError."""
        return self._decoded(await self._exchange(Exchange(method="GET", path=OVERRIDES_PATH), timeout), Overrides)

    async def ask(self, request: Request, timeout: float) -> Answer:
        command = str(type(request).__struct_config__.tag)
        asked = Exchange(method="POST", path=f"/v1/{command}", body=msgspec.json.encode(request).decode())
        return self._decoded(await self._exchange(asked, timeout), Answer)

    async def store_call(self, request: bytes, timeout: float) -> bytes:
        found = await self._exchange(Exchange(method="POST", path="/v1/store", body=request.decode()), timeout)
        if found.status != 200:
            raise self._refusal(found)
        return found.body.encode()

    async def aclose(self) -> None:
        return None

    def _decoded(self, found: Exchanged, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(found.body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise self._refusal(found) from None

    def _refusal(self, found: Exchanged) -> HandoffError:
        try:
            said = msgspec.json.decode(found.body, type=Answer).message
        except (msgspec.DecodeError, UnicodeDecodeError):
            said = "is it a balancer?"
        return HandoffError(f"balancer {self.name}: status {found.status}: {said}")


class RemoteBalancer(_Client):
    """Over a transport. Owns it."""

    def __init__(self, name: str, transport: Transport, service: str) -> None:
        super().__init__(name)
        self._transport = transport
        self._words = ["handoff", "lb", "request", f"--name={service}"]

    async def _exchange(self, asked: Exchange, timeout: float) -> Exchanged:
        output = await self._transport.request(self._words, msgspec.json.encode(asked), timeout)
        try:
            return msgspec.json.decode(output, type=Exchanged)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise HandoffError(f"balancer {self.name}: handoff lb request answers what cannot be read") from None

    async def aclose(self) -> None:
        await self._transport.aclose()


class DirectBalancer(_Client):
    """HTTP from this process, a connection for each question, in a thread."""

    def __init__(self, name: str, url: SplitResult | None, socket_path: str, token: str | None = None) -> None:
        super().__init__(name)
        self._url, self._socket_path, self._token = url, socket_path, token

    async def _exchange(self, asked: Exchange, timeout: float) -> Exchanged:
        try:
            return await asyncio.wait_for(asyncio.to_thread(self._ask, asked, timeout), timeout + 1.0)
        except TimeoutError:
            raise Unreachable(f"balancer {self.name}: no answer within {timeout:g} s") from None
        except ssl.SSLError as error:
            raise Unreachable(f"balancer {self.name}: TLS: {error.reason or error}") from None
        except OSError as error:
            raise Unreachable(f"balancer {self.name}: {(error.strerror or str(error)).lower()}") from None
        except http.client.HTTPException as error:
            raise Unreachable(f"balancer {self.name}: ended before it answered ({type(error).__name__})") from None

    def _ask(self, asked: Exchange, timeout: float) -> Exchanged:
        headers = {"Content-Type": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        connection = self._connection(timeout)
        try:
            connection.request(asked.method, asked.path, asked.body.encode() or None, headers)
            response = connection.getresponse()
            return Exchanged(status=response.status, body=response.read(MAXIMUM_ANSWER_BYTES).decode(errors="replace"))
        finally:
            connection.close()

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        if self._url is None:
            return _UnixConnection(self._socket_path, timeout)
        host = self._url.hostname or ""
        if self._url.scheme == "https":
            return http.client.HTTPSConnection(
                host, self._url.port, timeout=timeout, context=ssl.create_default_context()
            )
        return http.client.HTTPConnection(host, self._url.port, timeout=timeout)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(self._path)
        except BaseException:
            self.close()
            raise


def client_for(address: str, near: str = "", token: str | None = None) -> DirectBalancer | RemoteBalancer:
    """Connects to nobody yet. A relative `token_file` is taken from the directory `near`; without one, and without the
    variable, it is `token`. Raises UsageError."""
    kind, rest, url, query = _parsed(address)
    if url is None and kind == "unix":
        return DirectBalancer(address, None, rest)
    if url is None:
        directory = locate(rest or DEFAULT_NAME, run_directory_root(None, os.environ, os.geteuid()))
        return DirectBalancer(address, None, str(directory.path / SOCKET_NAME))
    if kind == "ssh":
        destination = (f"{url.username}@" if url.username else "") + str(url.hostname)
        transport = transport_for(f"ssh://{destination}:{url.port}" if url.port else destination)
        return RemoteBalancer(address, transport, query.get("name", DEFAULT_NAME))
    return DirectBalancer(address, url, "", _token(address, near, query.get("token_file")) or token)


def check_address(address: str) -> None:
    """Raises UsageError where it is none of a balancer. No file is read."""
    _parsed(address)


class _Parsed(NamedTuple):
    kind: str
    rest: str
    url: SplitResult | None
    """None: `unix` or `local`."""
    query: dict[str, str]


def _parsed(address: str) -> _Parsed:
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest:
        return _Parsed(kind, rest, None, {})
    if kind == "local":
        if rest:
            _check_name(address, rest)
        return _Parsed(kind, rest, None, {})
    url = urlsplit(address)
    try:
        _, query = (
            url.port,
            {key: values[-1] for key, values in parse_qs(url.query, strict_parsing=bool(url.query)).items()},
        )
    except ValueError as error:
        raise UsageError(f"balancer {address}: {error}") from None
    if url.hostname and not url.fragment and url.path in ("", "/"):
        if kind == "ssh" and not url.password and set(query) <= {"name"}:
            _check_name(address, query.get("name", DEFAULT_NAME))
            return _Parsed(kind, rest, url, query)
        if kind in ("http", "https") and not url.username and set(query) <= {"token_file"}:
            return _Parsed(kind, rest, url, query)
    shown = re.sub(r"(//[^/@:]*):[^@/]*@", r"\1:***@", address)  # a password has no place there, nor in a log
    raise UsageError(
        f"balancer {shown}: expected ssh://[USER@]HOST[:PORT][?name=NAME], http(s)://HOST:PORT[?token_file=PATH], "
        f"unix:PATH or local[:NAME]"
    )


def _check_name(address: str, name: str) -> None:
    if not is_service_name(name):
        raise UsageError(f"balancer {address}: {name!r} is no name of a service")


def _token(address: str, near: str, file: str | None) -> str | None:
    if file is None:
        return os.environ.get(TOKEN_VARIABLE)
    try:
        with open(os.path.join(near, file), "rb") as opened:
            return opened.read(_MAXIMUM_TOKEN_BYTES).decode("latin-1").strip()
    except OSError as error:
        raise UsageError(f"balancer {address}: {file} cannot be read ({error.strerror})") from None
