"""Checks over TLS, against a real server with a certificate made for it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop

from handoff.core.proxy_protocol import LOCAL_V2
from lb.control.checks import check_backend
from lb.control.tls import Contexts
from lb.core.model import Check
from tests.system.certificates import certificate
from tests.unit.lb_harness import SECONDS, Handler, backend, run

TLS = Check(type="tls", timeout_seconds=20.0)
HTTPS = Check(type="http", tls=True, path="/health", timeout_seconds=20.0)


def changed(check: Check, **fields: Any) -> Check:
    return msgspec.structs.replace(check, **fields)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates")
    certificate(directory)
    certificate(directory, "other-")
    return directory


@contextlib.contextmanager
def tls_server(directory: Path, seen: list[str | None], header: bytes = b"") -> Iterator[int]:
    """For one client, whom it answers over HTTP; what name it asks for is in `seen`. `header` must come before TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    context.sni_callback = lambda _socket, name, _context: seen.append(name)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(SECONDS)

    def serve() -> None:
        with contextlib.suppress(OSError):
            client, _ = listener.accept()
            client.settimeout(SECONDS)
            with client:
                if client.recv(len(header), socket.MSG_WAITALL) != header:
                    return
                with context.wrap_socket(client, server_side=True) as inside:
                    if inside.recv(4096):
                        inside.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nwell")
                        inside.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # it may wait for a client still
        thread.join()
        listener.close()


@pytest.mark.parametrize(
    ("check", "typed", "problem", "sni"),
    [
        (TLS, "localhost", "", "localhost"),
        (changed(TLS, sni="localhost"), "127.0.0.1", "", "localhost"),
        (changed(TLS, sni="shop.example"), "localhost", "TLS: Hostname mismatch", "shop.example"),
        (TLS, "127.0.0.1", "TLS: IP address mismatch", None),
        (changed(TLS, verify=False), "127.0.0.1", "", None),
        (changed(TLS, verify=False), "app.internal", "", "app.internal"),
        (changed(TLS, ca="other"), "localhost", "TLS: self-signed certificate", "localhost"),
        (changed(TLS, ca="none"), "localhost", "no such file or directory", None),
        (HTTPS, "localhost", "", "localhost"),
        (changed(HTTPS, host="localhost:444", body="well"), "127.0.0.1", "", "localhost"),
        (changed(HTTPS, status=(204, 204)), "localhost", "status 200", "localhost"),
    ],
)
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_handshakes_and_what_is_verified(
    made: Path,
    check: Check,
    typed: str,
    problem: str,
    sni: str | None,
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    files = {None: "cert.pem", "other": "other-cert.pem", "none": "none.pem"}
    if check.verify:
        check = changed(check, ca=str(made / files[check.ca]))

    seen: list[str | None] = []
    with tls_server(made, seen) as port:

        async def test() -> None:
            result = await check_backend(check, f"127.0.0.1:{port}", "off", f"{typed}:{port}")
            assert result.reason.startswith(problem or "passed in "), result.reason

        with asyncio.Runner(loop_factory=loop) as runner:  # the controller runs on either
            runner.run(asyncio.wait_for(test(), SECONDS))
    assert seen == ([] if check.ca == str(made / "none.pem") else [sni])


def test_a_proxy_header_goes_ahead_of_the_handshake(made: Path) -> None:
    check = changed(HTTPS, ca=str(made / "cert.pem"))
    with tls_server(made, [], LOCAL_V2) as port:

        async def test() -> None:
            result = await check_backend(check, f"127.0.0.1:{port}", "v2", f"localhost:{port}")
            assert result.reason.startswith("passed in "), result.reason

        run(test)


async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    writer.write(b"HTTP/1.1 400 This is no TLS\r\n\r\n")
    await writer.drain()
    await reader.read()


async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


@pytest.mark.parametrize(
    ("handler", "seconds", "problem"),
    [(plain, 20.0, "TLS: "), (closing, 20.0, ""), (silent, 0.1, "no answer within 0.1 s")],
)
def test_who_speaks_no_tls_fails(handler: Handler, seconds: float, problem: str) -> None:
    async def test() -> None:
        check = changed(TLS, verify=False, timeout_seconds=seconds)
        async with backend(handler) as port:
            result = await check_backend(check, f"127.0.0.1:{port}", "off")
        assert result.outcome.value == "failed"
        assert result.reason.startswith(problem), result.reason
        assert result.reason

    run(test)


def test_a_file_of_authorities_is_read_again_when_it_is_another_one(made: Path, tmp_path: Path) -> None:
    contexts, file = Contexts(), tmp_path / "ca.pem"
    file.write_bytes((made / "cert.pem").read_bytes())
    check = changed(TLS, ca=str(file))
    first = contexts.of(check)
    assert contexts.of(check) is first
    newer = tmp_path / "newer.pem"
    newer.write_bytes((made / "other-cert.pem").read_bytes() * 2)
    newer.rename(file)
    assert contexts.of(check) is not first
