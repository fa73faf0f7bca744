"""`--proxy-protocol`: the client is whom the proxy says, over reloads too; who sends no good header is closed."""

from __future__ import annotations

import contextlib
import socket
import ssl
from pathlib import Path

import pytest
from websockets.sync.client import connect as websocket

from handoff.core.proxy_protocol import LOCAL_V2, SIGNATURE, encode_v1, encode_v2
from tests.system.certificates import certificate
from tests.system.harness import DEADLINE_SECONDS, Clients, Service, read_response, wait_until

ASGI = """
async def app(scope, receive, send):
    assert scope["type"] == "http"
    body = f"{scope['client']} {scope['scheme']}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
"""
WSGI = """
def app(environ, start_response):
    body = environ["REMOTE_ADDR"].encode()
    start_response("200 OK", [("content-length", str(len(body)))])
    return [body]
"""
WEBSOCKET = """
async def app(scope, receive, send):
    assert scope["type"] == "websocket"
    await receive()
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.send", "text": str(scope["client"])})
    await receive()
"""
CLIENT, PROXY = ("203.0.113.7", 4711), ("192.0.2.1", 443)
V1, V2 = encode_v1(CLIENT, PROXY), encode_v2(CLIENT, PROXY)
REQUEST = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n"
SAID = b"('203.0.113.7', 4711) http"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "main.py").write_text(ASGI)
    return tmp_path


def connect(service: Service) -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.port), timeout=DEADLINE_SECONDS)


def ask(connection: socket.socket, *pieces: bytes) -> bytes:
    for piece in pieces:
        connection.sendall(piece)
    status, _, body = read_response(connection)
    assert status == 200, body
    return body


@pytest.mark.parametrize(("mode", "loop"), [("accept", "uvloop"), ("require", "asyncio")])
def test_the_client_is_whom_the_header_names(directory: Path, mode: str, loop: str) -> None:
    with Service(directory, "--proxy-protocol", mode, "--loop", loop) as service:
        for header in (V1, V2, V2[:-12] + V2[-12:]):
            with connect(service) as connection:
                assert ask(connection, header + REQUEST) == SAID
                assert ask(connection, REQUEST) == SAID
        with connect(service) as connection:  # byte by byte
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            assert ask(connection, *(bytes([byte]) for byte in V1 + REQUEST)) == SAID
        for header in (LOCAL_V2, b"PROXY UNKNOWN\r\n"):
            with connect(service) as connection:
                own = connection.getsockname()
                assert ask(connection, header + REQUEST) == f"{own} http".encode()
        with connect(service) as connection:  # a forwarded address is believed of the client that the header names
            forwarded = REQUEST.replace(b"\r\n\r\n", b"\r\nX-Forwarded-For: 198.51.100.9\r\n\r\n")
            assert ask(connection, V1 + forwarded) == SAID


def test_forwarded_headers_count_where_the_client_of_the_header_is_trusted(directory: Path) -> None:
    with Service(directory, "--proxy-protocol", "accept", "--forwarded-allow-ips", CLIENT[0]) as service:
        forwarded = REQUEST.replace(b"\r\n\r\n", b"\r\nX-Forwarded-For: 198.51.100.9\r\n\r\n")
        with connect(service) as connection:
            assert ask(connection, V2 + forwarded).startswith(b"('198.51.100.9', ")


def test_wsgi_sees_the_address_too(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(WSGI)
    with Service(tmp_path, "--proxy-protocol", "require") as service, connect(service) as connection:
        assert ask(connection, V2 + REQUEST) == CLIENT[0].encode()


def test_in_accept_mode_other_connections_are_served_as_ever(directory: Path) -> None:
    with Service(directory, "--proxy-protocol", "accept") as service:
        for first in (b"", b"\r\n", b"\r", b"P"):  # HTTP lets an empty line go before the request
            request = REQUEST.replace(b"GET", b"POST").replace(b"\r\n\r\n", b"\r\nContent-Length: 0\r\n\r\n")
            with connect(service) as connection:
                own = f"{connection.getsockname()} http".encode()
                if first == b"P":
                    assert ask(connection, request[:1], request[1:]) == own
                else:
                    assert ask(connection, first, request) == own


BAD: list[tuple[bytes, str]] = [
    (REQUEST, "sent no PROXY header"),
    (b"PROXY TCP4 nonsense\r\n" + REQUEST, "PROXY v1: malformed line"),
    (b"PROXY " + b"x" * 200, "PROXY v1: no end of line within 107 bytes"),
    (SIGNATURE + b"\x21\x11\xff\xff", "PROXY v2: a header of 65551 bytes; at most 4112"),
]


def test_a_peer_without_a_good_header_is_closed_and_named(directory: Path) -> None:
    with Service(directory, "--proxy-protocol", "require") as service:
        for data, reason in BAD:
            with connect(service) as connection:
                connection.sendall(data)
                with contextlib.suppress(ConnectionResetError):  # what it sent was not read to its end
                    assert connection.recv(1) == b""
            service.stderr.wait_for(rf"proxy-protocol: 127\.0\.0\.1 {reason}")
        with connect(service) as connection:
            assert ask(connection, V2 + REQUEST) == SAID


def test_a_header_that_does_not_come_or_ends_early_is_no_connection(directory: Path) -> None:
    with Service(directory, "--proxy-protocol", "require") as service:
        with connect(service) as early:
            early.sendall(V1[:10])
            early.shutdown(socket.SHUT_WR)
            service.stderr.wait_for(r"127\.0\.0\.1 ended within its PROXY header; the connection is closed")
        with connect(service) as late:
            late.sendall(V2[:10])
            assert late.recv(1) == b""
        service.stderr.wait_for(r"127\.0\.0\.1 sent no whole PROXY header within 5 s; the connection is closed")


def test_who_is_not_trusted_is_closed_or_an_ordinary_client(directory: Path) -> None:
    options = ("--proxy-from", "10.0.0.0/8", "--proxy-protocol")
    with Service(directory, *options, "require") as service, connect(service) as connection:
        connection.sendall(V2 + REQUEST)
        with pytest.raises((ConnectionResetError, EOFError)):
            read_response(connection)
        service.stderr.wait_for(r"proxy-protocol: 127\.0\.0\.1 is none of --proxy-from")
    with Service(directory, *options, "accept") as service:
        with connect(service) as connection:
            assert ask(connection, REQUEST) == f"{connection.getsockname()} http".encode()
        with connect(service) as connection:
            connection.sendall(V1 + REQUEST)
            assert read_response(connection)[0] == 400


def test_a_proxy_on_a_unix_socket_is_believed(directory: Path) -> None:
    with Service(directory, "--proxy-protocol", "require", bind="unix:s") as service:
        assert service.port == 0
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(directory / "s"))
            assert ask(connection, V2 + REQUEST) == SAID


def test_a_connection_that_moves_keeps_its_client(directory: Path) -> None:
    with Service(directory, "--proxy-protocol", "require") as service, connect(service) as kept:
        assert ask(kept, V1 + REQUEST) == SAID
        with connect(service) as begun:  # accepted, and its header comes only after the reload has begun
            begun.sendall(V1[:20])
            answer = service.begin({"type": "reload"})
            wait_until(lambda: service.status()["live"] == 2, "the new generation is live")
            assert ask(begun, V1[20:] + REQUEST) == SAID
            assert answer.answer()["exit_code"] == 0
        assert ask(kept, REQUEST) == SAID
        service.wait_for_generations(2)
        assert ask(kept, REQUEST) == SAID


def test_a_websocket_has_the_address_of_the_header(directory: Path) -> None:
    (directory / "main.py").write_text(WEBSOCKET)
    with Service(directory, "--proxy-protocol", "require") as service, connect(service) as connection:
        connection.sendall(V2)
        with websocket(f"ws://127.0.0.1:{service.port}/", sock=connection) as client:
            assert client.recv() == str(CLIENT)


def test_reloads_lose_no_connection_that_begins_with_a_header(directory: Path) -> None:
    with Service(directory, "--proxy-protocol", "require", "--workers", "2") as service:

        def exchange() -> None:
            with connect(service) as connection:
                assert ask(connection, V2, REQUEST) == SAID

        with Clients(exchange, 4, 0.005) as clients:
            for _ in range(3):
                assert service.ask({"type": "reload"})["exit_code"] == 0
                clients.more(20)
        clients.assert_none_failed()


def test_tls_begins_behind_the_header(directory: Path) -> None:
    certificate(directory)
    options = ("--proxy-protocol", "require", "--tls-cert", "cert.pem", "--tls-key", "key.pem")
    context = ssl.create_default_context(cafile=str(directory / "cert.pem"))
    with Service(directory, *options) as service, connect(service) as connection:
        connection.sendall(V2)
        with context.wrap_socket(connection, server_hostname="localhost") as wrapped:
            assert ask(wrapped, REQUEST) == SAID.replace(b"http", b"https")


def test_what_came_in_the_clear_is_no_part_of_tls(directory: Path) -> None:
    certificate(directory)
    options = ("--proxy-protocol", "accept", "--tls-cert", "cert.pem", "--tls-key", "key.pem")
    context = ssl.create_default_context(cafile=str(directory / "cert.pem"))
    with Service(directory, *options) as service:
        with connect(service) as connection:
            connection.sendall(b"PRO")
            with connect(service) as other, context.wrap_socket(other, server_hostname="localhost") as wrapped:
                ask(wrapped, REQUEST)  # by now the three bytes were taken
            with pytest.raises((ConnectionError, ssl.SSLEOFError)):
                context.wrap_socket(connection, server_hostname="localhost")
        service.stderr.wait_for(r"127\.0\.0\.1 sent neither a PROXY header nor TLS; the connection is closed")


def test_a_connection_whose_header_is_awaited_is_what_a_drain_waits_for(directory: Path) -> None:
    with Service(directory, "--proxy-protocol", "require") as service, connect(service) as late:
        late.sendall(V1[:10])
        with connect(service) as other:
            ask(other, V1 + REQUEST)  # by now the first one was accepted
        assert service.ask({"type": "reload"})["exit_code"] == 0
        (worker,) = service.status(drain=True)["generations"][0]["workers"]
        (hold,) = worker["holds"]
        host, port = late.getsockname()
        assert (hold["kind"], hold["peer"], hold["path"]) == ("connection", f"{host}:{port}", "no PROXY header yet")
        assert ask(late, V1[10:] + REQUEST) == SAID


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--proxy-protocol", "accept", "--proxy-from", "10.0.0.1/8"), '"10.0.0.1/8" is no network'),
        (("--proxy-from", "example.org"), '"example.org" is no network'),
        (("--proxy-protocol", "yes"), "'yes' is not one of 'off', 'accept', 'require'"),
    ],
)
def test_a_bad_option_is_one_line(directory: Path, arguments: tuple[str, ...], problem: str) -> None:
    with Service(directory, *arguments).launch() as service:
        assert service.wait() == 2
        said = service.stderr.finish()
        assert problem in said
        assert said.count("\n") <= 1
