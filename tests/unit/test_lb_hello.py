"""Clients whose ClientHello chooses the pool: on real sockets, in pieces, late, moving, and with tables that change."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from handoff.core.proxy_protocol import encode_v1, encode_v2
from lb.core.client_hello import MAXIMUM_HELLO_BYTES
from lb.core.model import HelloRoute, Timeouts
from lb.core.table import Endpoint
from lb.relay.attempt import AttemptState, Phase
from lb.relay.letters import AttemptLetter, decode, encode
from tests.system.certificates import certificate
from tests.unit.client_hellos import in_records, made_by_openssl
from tests.unit.test_lb_engine import Backend, Rig, endpoint, nobody_there
from tests.unit.test_lb_moving import Two, hang_up

ROUTES = (
    HelloRoute(sni=("api.example",), pool="api"),
    HelloRoute(sni=("*.example",), alpn=("h2",), pool="api"),
    HelloRoute(sni=("full.test",), pool="full"),
)
API = made_by_openssl("api.example")
OTHER = made_by_openssl("other.test")
LONG = Timeouts(client_hello_seconds=1000.0, queue_seconds=1000.0)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    made = Two(tmp_path)
    yield made
    for one in (made.old, made.new):
        one.engine.close_some(1000)
    assert not made.moving(made.old).hand_over_some(())
    made.new.close()
    made.old.close()


class Pools:
    """A pool `web`, which is active, and a pool `api`, which routes lead to; a backend in each."""

    def __init__(self, rig: Rig) -> None:
        self.web, self.api = rig.backend(), rig.backend()
        self._serves = [rig.serve]
        self.serve()

    def also(self, rig: Rig, **route: Any) -> None:
        self._serves.append(rig.serve)
        self.serve(**route)

    def serve(self, api: tuple[Endpoint, ...] | None = None, **route: Any) -> None:
        pools = {
            "web": (endpoint(self.web, "web"),),
            "api": (endpoint(self.api, "api"),) if api is None else api,
            "full": (),
        }
        given = {"pools": pools, "shares": {"web": 100}, "hello_routes": ROUTES, "timeouts": LONG} | route
        for serve in self._serves:
            serve(**given)

    def look(self) -> tuple[int, int]:
        return self.web.look(), self.api.look()


@pytest.fixture
def pools(rig: Rig) -> Pools:
    return Pools(rig)


def has_read(rig: Rig, size: int) -> bool:
    """Of one client, in its ClientHello."""
    return [len(one._first) for one in rig.engine.attempts if one.phase is Phase.HELLO] == [size]


def in_queue(rig: Rig) -> int:
    return sum(one.phase is Phase.QUEUE for one in rig.engine.attempts)


# --- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hello", "expected"),
    [
        (API, (0, 1)),
        (OTHER, (1, 0)),
        (made_by_openssl("www.example", ("http/1.1",)), (1, 0)),
        (made_by_openssl("www.example", ("http/1.1", "h2")), (0, 1)),
        (made_by_openssl(None, ("h2",)), (1, 0)),
        (b"GET / HTTP/1.1\r\nHost: api.example\r\n\r\n", (1, 0)),
        (in_records(b"\2\0\0\1x"), (1, 0)),
    ],
    ids=["by name", "no match", "another protocol", "by protocol", "no name", "no TLS", "malformed"],
)
def test_it_chooses_the_pool_and_reaches_the_backend_as_it_came(
    rig: Rig, pools: Pools, hello: bytes, expected: tuple[int, int]
) -> None:
    client = rig.client(hello + b"and more")
    rig.until(lambda: sum(pools.look()), "it is relayed")
    assert pools.look() == expected
    [connection] = pools.web.accepted + pools.api.accepted
    assert rig.read(connection, len(hello) + 8) == hello + b"and more"
    connection.send(b"answer")
    assert rig.read(client, 6) == b"answer"
    hang_up(client, connection)
    rig.until(rig.lines, "it has ended")
    assert [line["sent_bytes"] for line in rig.lines()] == [len(hello) + 8]


def test_a_hello_may_come_in_pieces(rig: Rig, pools: Pools) -> None:
    client = rig.client()
    for at in range(0, len(API), 100):
        client.send(API[at : at + 100])
        size = min(at + 100, len(API))
        rig.until(lambda read=size: pools.look() != (0, 0) or has_read(rig, read), "the piece is read")  # type: ignore[misc]
        assert pools.look() == ((0, 0) if size < len(API) else (0, 1))
    assert rig.read(pools.api.accepted[0], len(API)) == API


def test_a_hello_behind_the_header_of_a_proxy(rig: Rig, pools: Pools) -> None:
    pools.serve(accept_proxy="require", send_proxy="v1")
    header = encode_v2(("192.0.2.7", 1234), ("192.0.2.8", 443))
    clients = [rig.client(header + API), rig.client(header)]
    rig.until(lambda: has_read(rig, 0), "the header is read")
    clients[1].send(API)
    rig.until(lambda: pools.look() == (0, 2), "both are relayed")
    expected = encode_v1(("192.0.2.7", 1234), ("192.0.2.8", 443)) + API
    for one in pools.api.accepted:
        assert rig.read(one, len(expected)) == expected


def test_another_backend_of_the_same_pool_is_tried_and_no_other_pool(rig: Rig, pools: Pools) -> None:
    pools.serve(api=(endpoint(nobody_there(), "gone"), endpoint(pools.api, "api")))
    for number in range(1, 4):
        rig.client(API)
        rig.until(lambda wanted=number: pools.api.look() == wanted, "it is relayed")  # type: ignore[misc]
    pools.serve(api=(endpoint(nobody_there(), "gone"),))
    assert rig.read(rig.client(API)) == b"reset"
    assert rig.read(rig.client(made_by_openssl("full.test"))) == b"reset"
    assert pools.look() == (0, 3)
    assert [line["end"] for line in rig.lines()] == ["SC", "SH"]


def test_the_log_says_what_was_asked_for(rig: Rig, pools: Pools) -> None:
    hellos = (made_by_openssl("api.example", ("h2", "x" * 40)), made_by_openssl(None), b"GET /")
    for number, data in enumerate(hellos, 1):
        client = rig.client(data)
        rig.until(lambda wanted=number: sum(pools.look()) == wanted, "it is relayed")  # type: ignore[misc]
        hang_up(client, *pools.web.accepted, *pools.api.accepted)
        rig.until(lambda wanted=number: len(rig.lines()) == wanted, "it is logged")  # type: ignore[misc]
    found = [(line.get("sni", "none"), line.get("alpn", "none")) for line in rig.lines()]
    assert found == [("api.example", ["h2", "x" * 32]), ("none", "none"), ("none", "none")]


# --- clients that say something else, or nothing --------------------------------------------------------------------


def test_a_silent_client_goes_to_the_active_pool_after_its_time(rig: Rig, pools: Pools) -> None:
    pools.serve(timeouts=Timeouts(client_hello_seconds=0.01))
    client = rig.client()
    rig.until(pools.web.look, "it is relayed")
    pools.web.accepted[0].send(b"220 welcome")
    assert rig.read(client, 11) == b"220 welcome"


@pytest.mark.parametrize(("tls", "size"), [("accept", 50), ("require", 50), ("require", 0)])
def test_who_has_begun_and_is_late_or_must_begin_is_reset(rig: Rig, pools: Pools, tls: str, size: int) -> None:
    pools.serve(tls=tls, timeouts=Timeouts(client_hello_seconds=0.01))
    assert rig.read(rig.client(API[:size])) == b"reset"
    assert [(line["end"], line["reason"]) for line in rig.lines()] == [("cH", "no ClientHello in time")]
    assert pools.look() == (0, 0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"GET / HTTP/1.1\r\n", "no TLS"), (in_records(b"\2\0\0\1x"), "a handshake that begins with a message of type 2")],
)
def test_where_tls_is_required_nothing_else_gets_a_backend(rig: Rig, pools: Pools, data: bytes, reason: str) -> None:
    pools.serve(tls="require", hello_routes=())
    assert rig.read(rig.client(data)) == b"reset"
    assert [(line["end"], line["reason"]) for line in rig.lines()] == [("PH", reason)]
    rig.client(API)
    rig.until(pools.web.look, "TLS does")
    assert pools.look() == (1, 0)


@pytest.mark.parametrize("tls", ["accept", "require"])
def test_a_hello_without_an_end_is_not_read_on(rig: Rig, pools: Pools, tls: str) -> None:
    pools.serve(tls=tls)
    data = in_records(b"\1\0\x3f\0" + bytes(5000), *(bytes([0]) for _ in range(2000)))
    assert len(data) > MAXIMUM_HELLO_BYTES
    client = rig.client(data)
    if tls == "require":
        assert rig.read(client) == b"reset"
        assert [line["reason"] for line in rig.lines()] == [f"a ClientHello of more than {MAXIMUM_HELLO_BYTES} bytes"]
    else:
        rig.until(pools.web.look, "the active pool may say what it thinks of it")
        assert rig.read(pools.web.accepted[0], len(data)) == data


@pytest.mark.parametrize("size", [0, 50])
def test_a_client_that_leaves_before_it_has_asked_is_gone(rig: Rig, pools: Pools, size: int) -> None:
    client = rig.client(API[:size])
    rig.until(lambda: has_read(rig, size), "it is read")
    client.close()
    rig.until(lambda: not rig.engine.waiting, "it is gone")
    assert [(line["end"], line["reason"]) for line in rig.lines()] == [("CH", "left")]
    assert pools.look() == (0, 0)


def test_clients_that_say_nothing_count_for_their_source(rig: Rig, pools: Pools) -> None:
    pools.serve(per_source=1)
    rig.client()
    rig.until(lambda: has_read(rig, 0), "it is waited for")
    assert rig.read(rig.client(API)) == b"reset"


# --- the queue ------------------------------------------------------------------------------------------------------


def test_who_waits_for_one_pool_holds_up_nobody_for_another(rig: Rig, pools: Pools) -> None:
    places = (endpoint(pools.api, "api", maxconn=1),)
    pools.serve(api=places, pools={"web": (endpoint(pools.web, "web", maxconn=1),), "api": places})
    firsts = [rig.client(API), rig.client(OTHER)]
    rig.until(lambda: pools.look() == (1, 1), "both are relayed")
    rig.client(API + b"second")
    rig.until(lambda: in_queue(rig) == 1, "one waits for api")
    rig.client(OTHER + b"second")
    rig.client(API + b"third")
    rig.until(lambda: in_queue(rig) == 3, "and others")
    dispatcher = rig.engine._services["shop"].dispatcher
    assert (dispatcher.waiting, len(dispatcher.queue), len(dispatcher.routed["api"])) == (3, 1, 2)
    hang_up(firsts[1], pools.web.accepted[0])
    rig.until(lambda: pools.look() == (2, 1), "web has a place")
    assert rig.read(pools.web.accepted[1], len(OTHER) + 6) == OTHER + b"second"
    hang_up(firsts[0], pools.api.accepted[0])
    rig.until(lambda: pools.look() == (2, 2), "api has a place")
    assert rig.read(pools.api.accepted[1], len(API) + 6) == API + b"second"
    pools.serve()
    rig.until(lambda: pools.look() == (2, 3), "there are places for all")


def test_those_in_the_queue_follow_routes_that_change(rig: Rig, pools: Pools) -> None:
    full = {
        "web": (endpoint(pools.web, "web"),),
        "api": (endpoint(pools.api, "api", is_eligible=False, is_awaited=True),),
    }
    pools.serve(pools=full)
    for number in range(1, 4):
        rig.client(API + bytes([number]))
        rig.until(lambda wanted=number: in_queue(rig) == wanted, "it waits")  # type: ignore[misc]
    assert pools.look() == (0, 0)
    pools.serve(pools=full, hello_routes=(HelloRoute(sni=("x.test",), pool="api"),))
    rig.until(lambda: pools.look() == (3, 0), "they are relayed to the active pool")
    seen = [rig.read(one, len(API) + 1)[-1] for one in pools.web.accepted]
    assert seen == [1, 2, 3]


# --- tables ---------------------------------------------------------------------------------------------------------


def test_a_switch_of_the_active_pool_leaves_routes_alone(rig: Rig, pools: Pools) -> None:
    green = rig.backend()
    all_pools = {
        "web": (endpoint(pools.web, "web"),),
        "green": (endpoint(green, "green"),),
        "api": (endpoint(pools.api, "api"),),
    }
    pools.serve(pools=all_pools, shares={"green": 100})
    rig.client(API)
    rig.client(OTHER)
    rig.until(lambda: (*pools.look(), green.look()) == (0, 1, 1), "both are relayed")


def stuck() -> tuple[socket.socket, list[socket.socket]]:
    """A listener that a connection to is not made, and what fills it."""
    full = socket.socket()
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    fillers = [socket.socket() for _ in range(3)]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(full.getsockname())
    return full, fillers


def test_an_attempt_that_the_new_routes_do_not_allow_is_given_up_for_another(rig: Rig, pools: Pools) -> None:
    full, fillers = stuck()
    never = (endpoint(f"127.0.0.1:{full.getsockname()[1]}", "never"),)
    pools.serve(api=never)
    rig.client(API)
    rig.until(lambda: any(one.target for one in rig.engine.attempts), "it tries api")
    pools.serve(api=never, shares={"full": 100})
    assert [one.phase for one in rig.engine.attempts] == [Phase.CONNECT], "it is no business of the shares"
    pools.serve(api=never, hello_routes=(HelloRoute(sni=("*.example",), pool="api"),))
    assert [one.phase for one in rig.engine.attempts] == [Phase.CONNECT], "another route, the same pool"
    pools.serve(api=never, hello_routes=(HelloRoute(sni=("*.example",), pool="web"),))
    rig.until(pools.web.look, "it went elsewhere")
    assert rig.read(pools.web.accepted[0], len(API)) == API
    hang_up(full, *fillers)


def test_routes_that_come_are_for_those_who_wait_already(rig: Rig, pools: Pools) -> None:
    full, fillers = stuck()
    never = {"web": (endpoint(f"127.0.0.1:{full.getsockname()[1]}", "n"),), "api": (endpoint(pools.api, "api"),)}
    pools.serve(pools=never, hello_routes=())
    rig.client(API)
    rig.until(lambda: any(one.target for one in rig.engine.attempts), "it tries web")
    pools.serve(pools=never)
    rig.until(pools.api.look, "it is relayed by its name")
    awaited = {"web": (endpoint(pools.web, "w", is_eligible=False, is_awaited=True),), "api": never["api"]}
    pools.serve(pools=awaited, hello_routes=())
    rig.client(API)
    late = rig.client()
    rig.until(lambda: in_queue(rig) == 2, "they are in the queue")
    pools.serve(pools=awaited)
    rig.until(lambda: pools.api.look() == 2, "it is relayed by its name")
    late.send(API)
    rig.until(lambda: pools.api.look() == 3, "so is who speaks later")
    hang_up(full, *fillers)


def test_nobody_is_waited_for_any_more_once_no_route_is_left(rig: Rig, pools: Pools) -> None:
    client = rig.client(API[:50])
    rig.until(lambda: has_read(rig, 50), "it is read")
    pools.serve(hello_routes=())
    rig.until(pools.web.look, "it is relayed")
    client.send(API[50:])
    assert rig.read(pools.web.accepted[0], len(API)) == API


def test_a_service_without_routes_reads_nothing(rig: Rig, pools: Pools) -> None:
    pools.serve(hello_routes=())
    rig.client()
    rig.until(pools.web.look, "it is relayed before it has said anything")
    assert pools.look() == (1, 0)


# --- moving ---------------------------------------------------------------------------------------------------------


def test_half_a_hello_moves_with_its_deadline(two: Two) -> None:
    pools = Pools(two.old)
    pools.also(two.new)
    client = two.old.client(API[:50])
    two.both(lambda: has_read(two.old, 50), "half of it is read")
    [attempt] = two.old.engine.attempts
    due_at = attempt.due_at
    two.move()
    [moved] = two.new.engine.attempts
    assert (moved.phase, moved.due_at) == (Phase.HELLO, pytest.approx(due_at))
    client.send(API[50:])
    two.new.until(pools.api.look, "it is relayed")
    assert two.new.read(pools.api.accepted[0], len(API)) == API
    hang_up(client, pools.api.accepted[0])
    two.new.until(two.new.lines, "it has ended")
    assert [line["sni"] for line in two.new.lines()] == ["api.example"]


def test_a_client_in_the_queue_of_a_route_moves_and_a_relay_keeps_its_name(two: Two) -> None:
    pools = Pools(two.old)
    one_place = (endpoint(pools.api, "api", maxconn=1),)
    pools.also(two.new, api=one_place, maximum_queue=1)
    first = two.old.client(API)
    two.both(lambda: pools.api.look() == two.old.engine.connections == 1, "relayed")
    second = two.old.client(API)
    two.both(lambda: in_queue(two.old) == 1, "one waits")
    [attempt] = two.old.engine.attempts
    due_at = attempt.due_at
    two.move()
    [moved] = two.new.engine.attempts
    assert (moved.phase, moved.due_at) == (Phase.QUEUE, pytest.approx(due_at))
    hang_up(first, pools.api.accepted[0])
    two.new.until(lambda: pools.api.look() == 2, "it has its place")
    hang_up(second, pools.api.accepted[1])
    two.new.until(lambda: len(two.new.lines()) == 2, "both have ended")
    assert [line["sni"] for line in two.new.lines()] == ["api.example"] * 2


def test_who_was_waited_for_in_vain_is_not_waited_for_again(two: Two) -> None:
    pools = Pools(two.old)
    awaited = (endpoint(pools.web, "web", is_eligible=False, is_awaited=True),)
    for_web = partial(pools.serve, pools={"web": awaited, "api": (endpoint(pools.api, "api"),), "full": ()})
    pools.also(two.new)
    for_web(timeouts=Timeouts(client_hello_seconds=0.01, queue_seconds=1000.0))
    two.old.client()
    two.both(lambda: [one.phase for one in two.old.engine.attempts] == [Phase.QUEUE], "it is in the queue")
    for_web(timeouts=LONG)
    two.move()
    assert [one.phase for one in two.new.engine.attempts] == [Phase.QUEUE]
    pools.serve()
    two.new.until(pools.web.look, "it is relayed")


@pytest.mark.parametrize("has_spoken", [True, False])
def test_moving_to_a_table_with_routes_and_to_one_without(two: Two, has_spoken: bool) -> None:
    pools = Pools(two.old)
    pools.also(two.new)
    awaited = (endpoint(pools.web, "web", is_eligible=False, is_awaited=True),)
    tables: dict[str, Any] = {"web": awaited, "api": (endpoint(pools.api, "api"),)}
    two.old.serve(pools=tables, shares={"web": 100}, timeouts=LONG)
    client = two.old.client(API if has_spoken else b"")
    two.both(lambda: in_queue(two.old) == 1, "it is in the queue")
    two.move()
    if not has_spoken:
        assert has_read(two.new, 0)
        client.send(API)
    two.new.until(pools.api.look, "it is relayed by its name")
    half = two.old.client(API[:50])
    pools.serve()
    two.new.serve(pools=tables, shares={"api": 100}, timeouts=LONG)
    two.both(lambda: has_read(two.old, 50), "half of it is read")
    two.move()
    two.new.until(lambda: pools.api.look() == 2, "nobody waits for the rest")
    half.send(API[50:])
    assert two.new.read(pools.api.accepted[1], len(API)) == API


def test_a_letter_says_no_phase_that_an_older_release_does_not_know(two: Two) -> None:
    pools = Pools(two.old)
    pools.also(two.new)
    two.old.client(API[:50])
    two.both(lambda: has_read(two.old, 50), "half of it is read")
    [attempt] = two.old.engine.attempts
    letter = decode(encode(AttemptLetter(service="shop", state=attempt.state())), 1)
    assert isinstance(letter, AttemptLetter)
    assert (letter.state.phase, letter.state.is_reading_hello, letter.state.first) == (Phase.QUEUE, True, API[:50])
    older = AttemptState(phase=Phase.QUEUE, began_at=1.0, deadline=2.0)
    assert (older.is_reading_hello, older.has_no_hello) == (False, False)


# --- TLS itself -----------------------------------------------------------------------------------------------------


class TlsEnd:
    """One end of TLS over a socket that does not block."""

    def __init__(self, context: ssl.SSLContext, sock: socket.socket, **more: Any) -> None:
        self._in, self._out, self._sock = ssl.MemoryBIO(), ssl.MemoryBIO(), sock
        self.tls = context.wrap_bio(self._in, self._out, **more)

    def done(self, step: Any) -> Any:
        """What the step gives; None while it waits for the other side."""
        with contextlib.suppress(BlockingIOError):
            self._in.write(self._sock.recv(65536))
        try:
            return step() or True
        except ssl.SSLWantReadError:
            return None
        finally:
            if self._out.pending:
                self._sock.send(self._out.read())


def server_context(directory: Path, name: str) -> ssl.SSLContext:
    certificate(directory, name, host=f"{name}.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / f"{name}cert.pem", directory / f"{name}key.pem")
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


@pytest.mark.parametrize("name", ["api", "web"])
def test_tls_is_between_client_and_backend(rig: Rig, pools: Pools, tmp_path: Path, name: str) -> None:
    backend: Backend = getattr(pools, name)
    accepting = server_context(tmp_path, name)
    connecting = ssl.create_default_context(cafile=str(tmp_path / f"{name}cert.pem"))
    connecting.set_alpn_protocols(["http/1.1"])
    client = TlsEnd(connecting, rig.client(), server_hostname=f"{name}.example")
    rig.until(lambda: client.done(client.tls.do_handshake) or backend.look(), "it has come through")
    server = TlsEnd(accepting, backend.accepted[0], server_side=True)
    done: set[str] = set()

    def shake_hands() -> bool:
        for one in (client, server):
            if str(id(one)) not in done and one.done(one.tls.do_handshake):
                done.add(str(id(one)))
        return len(done) == 2

    rig.until(shake_hands, "the handshake")
    assert client.tls.selected_alpn_protocol() == "http/1.1"
    assert client.done(lambda: client.tls.write(b"question")) == 8
    found: list[bytes] = []
    rig.until(lambda: found or found.extend(filter(None, [server.done(lambda: server.tls.read(8))])), "the question")
    assert found == [b"question"]
