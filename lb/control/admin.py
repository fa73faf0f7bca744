"""The admin API over HTTP, as an ASGI application: who may ask what, and what is answered. The API is in lb.core.admin.

A browser that was lured to a page of somebody else's can reach loopback, under a name of theirs (DNS rebinding): so the
Host header must be ours, and what another origin sends is refused.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NamedTuple

import msgspec

from lb.control.commands import Commands
from lb.control.controller import Controller
from lb.control.metrics import Metrics
from lb.control.status import status_of, unknown_names
from lb.control.store_api import StoreApi
from lb.core.admin import MAXIMUM_REQUEST_BYTES, STORE_PATH, Answer, Request

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_STATUSES = {0: 200, 2: 400, 4: 504, 5: 404, 6: 409, 7: 409, 9: 409}
"""Of answers, by their exit codes."""
_REQUEST: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_MAXIMUM_READ_BYTES = 4 * MAXIMUM_REQUEST_BYTES
"""What is too long is read up to here, for the client to see the answer."""
_OPEN = ("/livez", "/readyz")
"""They tell nothing that a connection would not tell: probes need no token."""
COMMANDS = tuple(str(one.__struct_config__.tag) for one in Request.__args__)


class Door(NamedTuple):
    """How requests come in. `is_private`: on the unix socket. `host`: the configured one."""

    is_private: bool
    is_loopback: bool = True
    host: str = ""
    token: str | None = None


class Reply(NamedTuple):
    status: int
    body: bytes
    content_type: str = "application/json"


class Admin:
    """What both doors lead to. Borrows the controller, and the store of rollouts."""

    def __init__(self, controller: Controller, store_api: StoreApi) -> None:
        self._controller = controller
        self._store_api = store_api
        self.commands = Commands(controller)
        self._metrics = Metrics(controller)
        self.is_draining = False

    def behind(self, door: Door) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
        """The ASGI application for requests that come in by this door."""

        async def application(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return  # no lifespan, and no WebSockets
            reply = await self._reply(door, scope, receive)
            headers = [(b"content-type", reply.content_type.encode()), (b"cache-control", b"no-store")]
            headers.append((b"content-length", str(len(reply.body)).encode()))
            if reply.status == 401:
                headers.append((b"www-authenticate", b"Bearer"))
            await send({"type": "http.response.start", "status": reply.status, "headers": headers})
            await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else reply.body})

        return application

    async def _reply(self, door: Door, scope: Scope, receive: Receive) -> Reply:
        method, path = scope["method"], scope["path"]
        if not self._controller.has_begun and path not in _OPEN:
            return problem(503, 1, "there is no table yet")
        refusal = may(door, method, path, scope["headers"])
        if refusal is not None:
            return refusal
        if method in ("GET", "HEAD"):
            return self._read(path, scope["headers"])
        if method != "POST":
            return problem(405, 2, f"{method}: expected GET or POST")
        command = path.removeprefix("/v1/")
        if path != STORE_PATH and (command not in COMMANDS or not path.startswith("/v1/")):
            return problem(404, 2, f"{path}: no such command; there are {', '.join(COMMANDS)}")
        body = await _body(receive)
        if body is None:
            return problem(413, 2, f"a request of more than {MAXIMUM_REQUEST_BYTES} bytes")
        if path == STORE_PATH:
            return Reply(200, await self._store_api.reply(body))
        try:
            request = _REQUEST.decode(_tagged(body, command))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return problem(400, 2, f"{command}: {error}")
        answer = await self.commands.carry_out(request)
        return Reply(_STATUSES.get(answer.exit_code, 500), msgspec.json.encode(answer))

    def _read(self, path: str, headers: list[tuple[bytes, bytes]]) -> Reply:
        match path:
            case "/v1/status":
                return Reply(200, msgspec.json.encode(status_of(self._controller)))
            case "/v1/overrides":
                return Reply(200, msgspec.json.encode(self._controller.overrides))
            case "/metrics":
                body, content_type = self._metrics.render(_header(headers, b"accept") or "")
                return Reply(200, body, content_type)
            case "/livez":
                return Reply(200, b"alive\n", "text/plain")
            case "/readyz":
                why = self._why_not_ready()
                return Reply(200, b"ready\n", "text/plain") if why is None else Reply(503, why, "text/plain")
        return problem(404, 2, f"{path}: there are /v1/status, /v1/overrides, /metrics, /livez, /readyz")

    def _why_not_ready(self) -> bytes | None:
        if self.is_draining:
            return b"draining\n"
        if not self._controller.has_begun:
            return b"no table yet\n"
        connected = self._controller.relays.connected
        if connected and all(peer.is_draining for peer in connected):
            return b"all relay workers drain\n"
        if not connected and not self._controller.page.rows():
            return b"there is no relay worker\n"
        for service, names in unknown_names(self._controller).items():
            return f"service {service}: no address is known of {', '.join(names)}\n".encode()
        return None


def may(door: Door, method: str, path: str, headers: list[tuple[bytes, bytes]]) -> Reply | None:
    """Whether a request is refused, and how."""
    origin, host = _header(headers, b"origin"), _header(headers, b"host") or ""
    if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
        return problem(403, 9, f"origin {origin} may not ask this")
    if door.is_private:
        return None
    has_token = _has_token(door, _header(headers, b"authorization"))
    if not has_token and not _is_host(_without_port(host), door.host):
        return problem(403, 9, f"host {host}: is not what this is called; ask by its address")
    if method in ("GET", "HEAD") and (door.is_loopback or path in _OPEN):
        return None
    if has_token:
        return None
    if door.token is None:
        return problem(
            403, 9, "changes are taken on admin.sock only; over TCP they need admin_token_file in [balancer]"
        )
    return problem(401, 9, "this needs the token: Authorization: Bearer TOKEN")


def problem(status: int, exit_code: int, message: str) -> Reply:
    return Reply(status, msgspec.json.encode(Answer(exit_code=exit_code, message=message)))


def _has_token(door: Door, authorization: str | None) -> bool:
    if door.token is None or authorization is None:
        return False
    scheme, _, given = authorization.partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), door.token.encode())


def _is_host(host: str, configured: str) -> bool:
    """No name that others could make point here. An address is none: to whom it belongs cannot be rebound."""
    if host.lower() in ("localhost", configured.lower()) and host:
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return address.is_loopback or configured in ("0.0.0.0", "::")


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _header(headers: list[tuple[bytes, bytes]], name: bytes) -> str | None:
    """Two of a kind are none that we know."""
    found = [value for key, value in headers if key.lower() == name]
    return ", ".join(value.decode("latin-1") for value in found) if found else None


async def _body(receive: Receive) -> bytes | None:
    """None: too long."""
    body, size = bytearray(), 0
    while True:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size <= MAXIMUM_REQUEST_BYTES:
            body += part
        if size > _MAXIMUM_READ_BYTES or not message.get("more_body", False):
            return bytes(body) if size <= MAXIMUM_REQUEST_BYTES else None


def _tagged(body: bytes, command: str) -> bytes:
    """The path names the command; a body may leave it out."""
    fields = msgspec.json.decode(body or b"{}")
    if not isinstance(fields, dict):
        raise msgspec.DecodeError("expected a JSON object")
    if fields.setdefault("type", command) != command:
        raise msgspec.DecodeError(f"the body is of another command, {fields['type']!r}")
    return msgspec.json.encode(fields)
