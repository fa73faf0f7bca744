"""What handoff builds on inside uvicorn, one test for each: a release that changes one fails here and names it."""

from __future__ import annotations

import ast
import asyncio
import inspect
import textwrap
import tomllib
from collections import deque
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from uvicorn.config import Config
from uvicorn.lifespan.off import LifespanOff
from uvicorn.lifespan.on import LifespanOn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.http11 import Request
from websockets.protocol import State as ConnectionState
from websockets.server import ServerProtocol

from handoff.worker.tested import can_move
from handoff.worker.websocket import _independent_frames

ROOT = Path(__file__).parents[2]


async def application(scope: Any, receive: Any, send: Any) -> None: ...


@pytest.fixture
def loop() -> Any:
    with asyncio.Runner() as runner:
        yield runner.get_loop()


@pytest.fixture
def config() -> Config:
    found = Config(application, http=HttpToolsProtocol, ws=WebSocketsSansIOProtocol, log_config=None)
    found.load()
    return found


@pytest.fixture
def protocol(config: Config, loop: Any) -> HttpToolsProtocol:
    return HttpToolsProtocol(config, ServerState(), {}, loop)


def parameters_of(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def tree_of(function: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def calls_in(function: Any) -> list[str]:
    return [ast.unparse(node) for node in ast.walk(tree_of(function)) if isinstance(node, ast.Call)]


def position(function: Any, text: str) -> int:
    source = inspect.getsource(function)
    assert text in source, f"uvicorn's {function.__qualname__} has no {text!r} any more"
    return source.index(text)


def test_the_installed_release_is_inside_the_declared_bound() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (bound,) = [one.removeprefix("uvicorn>=") for one in dependencies if one.startswith("uvicorn>=")]
    numbers = [tuple(map(int, text.split(".")[:2])) for text in (version("uvicorn"), bound)]
    assert numbers[0] >= numbers[1]


def test_moves_are_on_for_the_installed_release() -> None:
    assert can_move(slot=1), "run all tests with it, and then take it into handoff.worker.tested"


BODIES = {
    HttpToolsProtocol.connection_made: """
def connection_made(self, transport: asyncio.Transport) -> None:
    self.connections.add(self)
    self.transport = transport
    self.flow = FlowControl(transport)
    self.server = get_local_addr(transport)
    self.client = get_remote_addr(transport)
    self.scheme = 'https' if is_ssl(transport) else 'http'
    if self.logger.level <= TRACE_LOG_LEVEL:
        prefix = '%s:%d - ' % self.client if self.client else ''
        self.logger.log(TRACE_LOG_LEVEL, '%sHTTP connection made', prefix)
""",
    HttpToolsProtocol.data_received: """
def data_received(self, data: bytes) -> None:
    self._unset_keepalive_if_required()
    try:
        self.parser.feed_data(data)
    except httptools.HttpParserError:
        msg = 'Invalid HTTP request received.'
        self.logger.warning(msg)
        self.send_400_response(msg)
        return
    except httptools.HttpParserUpgrade:
        if self._should_upgrade():
            self.handle_websocket_upgrade()
        else:
            self._unsupported_upgrade_warning()
""",
    HttpToolsProtocol.on_body: """
def on_body(self, body: bytes) -> None:
    if (self.parser.should_upgrade() and self._should_upgrade()) or self.cycle.response_complete:
        return
    self.cycle.body += body
    if len(self.cycle.body) > HIGH_WATER_LIMIT:
        self.flow.pause_reading()
    self.cycle.message_event.set()
""",
    HttpToolsProtocol.on_message_complete: """
def on_message_complete(self) -> None:
    if (self.parser.should_upgrade() and self._should_upgrade()) or self.cycle.response_complete:
        return
    self.cycle.more_body = False
    self.cycle.message_event.set()
""",
    HttpToolsProtocol._unset_keepalive_if_required: """
def _unset_keepalive_if_required(self) -> None:
    if self.timeout_keep_alive_task is not None:
        self.timeout_keep_alive_task.cancel()
        self.timeout_keep_alive_task = None
""",
}


@pytest.mark.parametrize("function", BODIES, ids=lambda function: function.__name__)
def test_what_we_repeat_is_what_uvicorn_does(function: Any) -> None:
    assert ast.unparse(tree_of(function)) == ast.unparse(ast.parse(BODIES[function]))


def test_a_scope_is_made_when_a_message_begins_and_its_cycle_when_its_head_ends() -> None:
    assert "self.scope = {" in inspect.getsource(HttpToolsProtocol.on_message_begin)
    assert "self.cycle = RequestResponseCycle(" in inspect.getsource(HttpToolsProtocol.on_headers_complete)
    assert "scope=self.scope" in inspect.getsource(HttpToolsProtocol.on_headers_complete)


def test_the_keep_alive_timer_is_a_timer_handle_of_the_loop() -> None:
    text = (
        "self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)"
    )
    assert text in ast.unparse(tree_of(HttpToolsProtocol.on_response_complete))


def test_reading_is_paused_and_resumed_through_the_flow() -> None:
    for name in ("pause_reading", "resume_reading"):
        assert f"self._transport.{name}()" in inspect.getsource(getattr(FlowControl, name))


# --- the protocol ---------------------------------------------------------------------------------------------------


def test_a_protocol_is_made_of_config_state_application_state_and_loop() -> None:
    expected = ["config", "server_state", "app_state", "_loop"]
    assert parameters_of(HttpToolsProtocol.__init__) == expected
    assert parameters_of(WebSocketsSansIOProtocol.__init__) == expected


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cycle", type(None)),
        ("scope", type(None)),
        ("pipeline", deque),
        ("connections", set),
        ("client", type(None)),
        ("transport", type(None)),
        ("flow", type(None)),
        ("loop", asyncio.AbstractEventLoop),
    ],
)
def test_a_protocol_has_its_attribute(protocol: HttpToolsProtocol, name: str, kind: type) -> None:
    assert hasattr(protocol, name), f"HttpToolsProtocol.{name} is gone"
    assert isinstance(getattr(protocol, name), kind), f"HttpToolsProtocol.{name} is something else"


def test_connections_and_tasks_are_those_of_the_shared_state(protocol: HttpToolsProtocol) -> None:
    assert protocol.connections is protocol.server_state.connections
    assert protocol.tasks is protocol.server_state.tasks


def test_a_protocol_may_replace_its_methods(protocol: HttpToolsProtocol) -> None:
    protocol._start_asgi_task = protocol._start_asgi_task  # type: ignore[method-assign]
    assert "_start_asgi_task" in protocol.__dict__


def test_every_request_is_started_by_start_asgi_task() -> None:
    assert parameters_of(HttpToolsProtocol._start_asgi_task) == ["cycle", "app"]
    assert "self._start_asgi_task(self.cycle, app)" in calls_in(HttpToolsProtocol.on_headers_complete)
    assert "self._start_asgi_task(cycle, app)" in calls_in(HttpToolsProtocol.on_response_complete)
    starters = [
        name
        for name, function in inspect.getmembers(HttpToolsProtocol, inspect.isfunction)
        if any("run_asgi(" in call for call in calls_in(function))
    ]
    assert starters == ["_start_asgi_task"], "a request is started somewhere else, too"


def test_waiting_requests_are_pairs_of_a_cycle_and_an_application() -> None:
    assert "self.pipeline.appendleft((self.cycle, app))" in calls_in(HttpToolsProtocol.on_headers_complete)
    assert "self.pipeline.pop()" in calls_in(HttpToolsProtocol.on_response_complete)


def test_the_end_of_a_response_is_told_to_on_response_complete() -> None:
    assert parameters_of(HttpToolsProtocol.on_response_complete) == []
    assert position(HttpToolsProtocol.on_headers_complete, "on_response=self.on_response_complete")
    assert position(HttpToolsProtocol.on_response_complete, "self.server_state.total_requests += 1")


def test_the_scope_of_a_cycle_is_the_protocols_until_the_next_request_begins() -> None:
    assert position(HttpToolsProtocol.on_headers_complete, "scope=self.scope")
    assert position(HttpToolsProtocol.on_message_begin, "self.scope = {")


def test_an_upgrade_leaves_the_connections_and_makes_the_configured_protocol() -> None:
    assert "self.connections.discard(self)" in calls_in(HttpToolsProtocol.handle_websocket_upgrade)
    assert position(HttpToolsProtocol.handle_websocket_upgrade, "server_state=self.server_state")


def test_reading_can_be_resumed() -> None:
    assert "self.flow.resume_reading()" in calls_in(HttpToolsProtocol.on_response_complete)


# --- the cycle ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cycle() -> RequestResponseCycle:
    values: dict[str, Any] = dict.fromkeys(parameters_of(RequestResponseCycle.__init__))
    return RequestResponseCycle(**{**values, "keep_alive": True})


@pytest.mark.parametrize(
    "name",
    ["scope", "transport", "keep_alive", "response_started", "response_complete", "on_response", "disconnected"],
)
def test_a_cycle_has_its_attribute(cycle: RequestResponseCycle, name: str) -> None:
    assert name in cycle.__dict__, f"RequestResponseCycle.{name} is gone"


def test_a_cycle_has_no_slots_and_may_change_its_class(cycle: RequestResponseCycle) -> None:
    class Other(RequestResponseCycle): ...

    cycle.__class__ = Other
    assert isinstance(cycle, Other)


def test_response_started_is_set_before_keep_alive_is_asked_for() -> None:
    send = RequestResponseCycle.send
    assert position(send, "self.response_started = True") < position(send, "if not self.keep_alive")


def test_a_response_without_keep_alive_says_so_in_its_head() -> None:
    assert position(RequestResponseCycle.send, 'b"connection: close\\r\\n"')


def test_after_a_response_without_keep_alive_its_transport_is_closed_and_then_its_end_is_told() -> None:
    send = RequestResponseCycle.send
    end = position(send, "self.response_complete = True")
    closing, telling = position(send, "self.transport.close()"), position(send, "self.on_response()")
    assert end < closing < telling


def test_a_cycle_uses_no_more_of_its_transport_than_handoff_replaces() -> None:
    used = {
        node.attr
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(RequestResponseCycle))))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self.transport"
    }
    assert used == {"write", "close", "is_closing"}


# --- websockets, lifespan, state, configuration ---------------------------------------------------------------------


def test_a_websocket_protocol_is_shut_down_with_1012() -> None:
    assert parameters_of(WebSocketsSansIOProtocol.shutdown) == []
    assert "self.conn.send_close(1012)" in calls_in(WebSocketsSansIOProtocol.shutdown)


@pytest.mark.parametrize("name", ["scope", "client", "handshake_initiated", "transport", "connections"])
def test_a_websocket_protocol_has_its_attribute(config: Config, loop: Any, name: str) -> None:
    async def make() -> WebSocketsSansIOProtocol:
        return WebSocketsSansIOProtocol(config, ServerState(), {}, loop)

    source = inspect.getsource(WebSocketsSansIOProtocol)
    assert hasattr(loop.run_until_complete(make()), name) or f"self.{name}" in source


@pytest.mark.parametrize(
    ("name", "kind"), [("total_requests", int), ("connections", set), ("tasks", set), ("default_headers", list)]
)
def test_the_server_state_has_its_field(name: str, kind: type) -> None:
    assert isinstance(getattr(ServerState(), name), kind)
    assert set(vars(ServerState())) == {"total_requests", "connections", "tasks", "default_headers"}


def test_the_default_headers_are_taken_afresh_for_every_request() -> None:
    assert position(HttpToolsProtocol.on_headers_complete, "default_headers=self.server_state.default_headers")


@pytest.mark.parametrize("kind", [LifespanOn, LifespanOff])
def test_a_lifespan_has_what_the_worker_uses(config: Config, loop: Any, kind: Any) -> None:
    async def make() -> Any:
        return kind(config)

    lifespan = loop.run_until_complete(make())
    assert (lifespan.should_exit, lifespan.state) == (False, {})
    assert inspect.iscoroutinefunction(lifespan.startup)
    assert inspect.iscoroutinefunction(lifespan.shutdown)


def test_a_failed_lifespan_sets_should_exit_and_logs_why(caplog: pytest.LogCaptureFixture, loop: Any) -> None:
    async def failing(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database"})

    async def start() -> LifespanOn:
        lifespan = LifespanOn(Config(failing, http=HttpToolsProtocol, log_config=None))
        await lifespan.startup()
        return lifespan

    assert loop.run_until_complete(start()).should_exit
    assert ("uvicorn.error", 40, "no database") in caplog.record_tuples


def test_the_loaded_configuration_has_what_the_worker_uses(config: Config) -> None:
    assert config.lifespan_class in (LifespanOn, LifespanOff)
    assert config.ssl is None
    assert config.date_header is True
    assert config.limit_max_requests is None
    assert config.http_protocol_class is HttpToolsProtocol
    assert config.ws_protocol_class is WebSocketsSansIOProtocol
    assert isinstance(config.encoded_headers, list)


@pytest.mark.parametrize(
    "name",
    [
        "http",
        "ws",
        "interface",
        "log_config",
        "access_log",
        "forwarded_allow_ips",
        "root_path",
        "limit_concurrency",
        "backlog",
        "timeout_keep_alive",
        "headers",
        "limit_max_requests",
        "ssl_keyfile",
        "ssl_certfile",
    ],
)
def test_the_configuration_takes_the_parameter(name: str) -> None:
    assert name in parameters_of(Config.__init__), f"uvicorn's Config takes no {name} any more"


# --- WebSockets that move -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("conn", "queue", "frames", "handshake_complete", "close_sent", "disconnected", "close_timer"),
        *("stop_keepalive", "start_keepalive", "run_asgi", "shutdown", "initial_response", "data_received"),
    ],
)
def test_a_websocket_has_its_attribute(config: Config, loop: Any, name: str) -> None:
    assert hasattr(WebSocketsSansIOProtocol(config, ServerState(), {}, loop), name)


def test_the_end_of_a_websockets_task_closes_the_connection_unless_a_close_is_timed() -> None:
    text = ast.unparse(tree_of(WebSocketsSansIOProtocol.run_asgi))
    assert text.rstrip().endswith("if self.close_timer is None:\n        self.transport.close()")


def test_what_is_sent_on_a_websocket_that_is_disconnected_is_an_error_of_the_application() -> None:
    assert position(WebSocketsSansIOProtocol.send, "if self.disconnected:") < position(
        WebSocketsSansIOProtocol.send, "raise ClientDisconnected()"
    )


def test_a_handshake_that_is_gone_through_again_negotiates_the_same() -> None:
    request = (
        b"GET /a?b HTTP/1.1\r\nHost: t\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n\r\n"
    )
    found = []
    for _ in range(2):
        connection = ServerProtocol(extensions=_independent_frames())
        connection.receive_data(request)
        (event,) = connection.events_received()
        assert isinstance(event, Request)
        response = connection.accept(event)
        connection.send_response(response)
        assert connection.state is ConnectionState.OPEN
        assert connection.current_size is None
        found.append(response.headers["Sec-WebSocket-Extensions"])
    assert found[0] == found[1]
    assert "server_no_context_takeover" in found[0]
    assert "client_no_context_takeover" in found[0]


def test_what_is_answered_beside_the_application_goes_through_these_methods() -> None:
    """`--metrics` counts the 400s; an adopted WebSocket turns a 500 into a frame."""
    assert parameters_of(HttpToolsProtocol.send_400_response) == ["msg"]
    assert "self.send_400_response" in inspect.getsource(HttpToolsProtocol.data_received)
    assert parameters_of(WebSocketsSansIOProtocol.send_500_response) == []
    for function in (WebSocketsSansIOProtocol.run_asgi, WebSocketsSansIOProtocol.shutdown):
        assert "self.send_500_response()" in inspect.getsource(function)


def test_the_keep_alive_timer_calls_its_handler() -> None:
    assert "self.timeout_keep_alive_handler" in inspect.getsource(HttpToolsProtocol.on_response_complete)
    assert "self.timeout_keep_alive_task.cancel()" in inspect.getsource(HttpToolsProtocol._unset_keepalive_if_required)
