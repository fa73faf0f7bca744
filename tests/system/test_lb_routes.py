"""Two TLS servers with certificates of their own behind one listener: SNI and ALPN choose, over reloads and applies."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from pathlib import Path
from types import TracebackType

import pytest

from tests.system.balancer import Balancer, config
from tests.system.certificates import certificate
from tests.system.harness import DEADLINE_SECONDS, Clients, wait_until

API, SHOP = "api.example", "shop.example"


class TlsServer:
    """Answers each line with its own name, the line, and the protocol. Serves on a thread; owns its certificate."""

    def __init__(self, directory: Path, host: str) -> None:
        self.host = host
        certificate(directory, host, host=host)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(directory / f"{host}cert.pem", directory / f"{host}key.pem")
        self._context.set_alpn_protocols(["h2", "http/1.1"])
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve_all(),))

    def __enter__(self) -> TlsServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(DEADLINE_SECONDS)
        self._loop.close()

    async def _serve_all(self) -> None:
        tasks: set[asyncio.Task[None]] = set()

        def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(self._serve(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_server(begin, sock=self.listener, ssl=self._context)
        await self._ended.wait()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            protocol = writer.get_extra_info("ssl_object").selected_alpn_protocol()
            with contextlib.suppress(ConnectionError):
                while line := await reader.readline():
                    writer.write(f"{self.host} {protocol} ".encode() + line)
                    await writer.drain()
        finally:
            writer.transport.abort()


def trusting(directory: Path, host: str, *alpn: str) -> ssl.SSLContext:
    """That one certificate, and no other."""
    context = ssl.create_default_context(cafile=str(directory / f"{host}cert.pem"))
    if alpn:
        context.set_alpn_protocols(alpn)
    return context


class Client:
    """Over TLS, to the server that its name and its protocols lead to; refuses any other certificate."""

    def __init__(self, service: Balancer, directory: Path, host: str, *alpn: str) -> None:
        context = trusting(directory, host, *alpn)
        plain = socket.create_connection(("127.0.0.1", service.port), DEADLINE_SECONDS)
        try:
            self.connection = context.wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise

    def ask(self) -> str:
        self.connection.sendall(b"line\n")
        found = b""
        while not found.endswith(b"\n"):
            part = self.connection.recv(1000)
            assert part, found
            found += part
        return found.decode()

    def close(self) -> None:
        self.connection.close()


class Slow:
    """Sends the first half of its ClientHello, and the other one when it is told to."""

    def __init__(self, service: Balancer, directory: Path, host: str) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = trusting(directory, host).wrap_bio(self._in, self._out, server_hostname=host)
        self._socket = socket.create_connection(("127.0.0.1", service.port), DEADLINE_SECONDS)
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
        self._rest = self._out.read()
        self._socket.sendall(self._rest[:100])

    def finish(self) -> None:
        """And shake hands with whoever has the certificate that is trusted."""
        self._socket.sendall(self._rest[100:])
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                data = self._socket.recv(65536)
                assert data, "closed in the handshake"
                self._in.write(data)

    def close(self) -> None:
        self._socket.close()


def routes(host: str = API) -> str:
    return f'[[service.route]]\nsni = ["{host}"]\npool = "api"\n[[service.route]]\nalpn = "h2"\npool = "api"\n'


def test_names_and_protocols_choose_the_server_over_reloads_and_applies(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        api = stack.enter_context(TlsServer(tmp_path, API))
        shop = stack.enter_context(TlsServer(tmp_path, SHOP))
        text = "[balancer]\nrelays = 2\n" + config(
            {"shop": [f'"{shop.address}"'], "api": [f'"{api.address}"']},
            service='timeouts = { client_hello = "5m" }',
        )
        service = stack.enter_context(Balancer(tmp_path, text + routes()))

        def client(host: str, *alpn: str) -> Client:
            return stack.enter_context(contextlib.closing(Client(service, tmp_path, host, *alpn)))

        def ask_both() -> None:
            for host in (API, SHOP):
                with contextlib.closing(Client(service, tmp_path, host)) as one:
                    assert one.ask() == f"{host} None line\n"

        ask_both()
        kept = {host: client(host) for host in (API, SHOP)}
        slow = [stack.enter_context(contextlib.closing(Slow(service, tmp_path, host))) for host in (API, SHOP) * 2]
        with pytest.raises(ssl.SSLCertVerificationError):  # its name says shop, its protocol api
            Client(service, tmp_path, SHOP, "h2")
        with Clients(ask_both) as clients:
            assert service.ask({"type": "reload"})["exit_code"] == 0
            wait_until(lambda: len(service.status()["generations"]) == 1, "no old process is left")
            clients.more(2)
        clients.assert_none_failed()
        for host, one in kept.items():
            assert one.ask() == f"{host} None line\n"
        for half in slow:
            half.finish()
        assert service.lb_status()["services"]["shop"]["routes"][0] == {"sni": [API], "alpn": [], "pool": "api"}
        service.write(text + routes(SHOP))
        service.done("apply")
        for host, one in kept.items():
            assert one.ask() == f"{host} None line\n"
        with pytest.raises(ssl.SSLCertVerificationError):
            client(SHOP)
        with pytest.raises(ssl.SSLCertVerificationError):
            client(API)
