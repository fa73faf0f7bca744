"""`--tls-cert` and its like: served from the start, taken anew at each reload, refused in one line."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import subprocess
from pathlib import Path

import pytest

from tests.system.certificates import certificate
from tests.system.harness import DEADLINE_SECONDS, Clients, Service, read_response

APP = """
async def app(scope, receive, send):
    assert scope["type"] == "http"
    body = scope["scheme"].encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
"""
PAIR = ("--tls-cert", "cert.pem", "--tls-key", "key.pem")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "main.py").write_text(APP)
    certificate(tmp_path)
    return tmp_path


def trusting(directory: Path, name: str = "") -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(directory / f"{name}cert.pem"))


def ask(service: Service, context: ssl.SSLContext) -> ssl.SSLSocket:
    """One request on a new connection, which is returned."""
    with contextlib.ExitStack() as undo:
        plain = undo.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=DEADLINE_SECONDS))
        connection = undo.enter_context(context.wrap_socket(plain, server_hostname="localhost"))
        connection.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        status, _, body = read_response(connection)
        assert (status, body) == (200, b"https")
        undo.pop_all()
        return connection


def test_a_reload_takes_new_files_and_a_bad_pair_rolls_back(directory: Path) -> None:
    with Service(directory, *PAIR) as service:
        first = trusting(directory)
        with ask(service, first) as connection:
            assert connection.version() in ("TLSv1.2", "TLSv1.3")
            certificate(directory)
            assert service.ask({"type": "reload"})["exit_code"] == 0
        service.wait_for_generations(2)  # a reload has its verdict when the new one serves; the old one may yet accept
        second = trusting(directory)
        ask(service, second).close()
        with pytest.raises(ssl.SSLCertVerificationError):
            ask(service, first)
        certificate(directory, "other-")
        (directory / "key.pem").write_bytes((directory / "other-key.pem").read_bytes())
        answer = service.ask({"type": "reload"})
        assert answer["exit_code"] == 3
        assert "is not the key of tls-cert" in answer["message"]
        ask(service, second).close()


def test_a_generation_is_pinned_to_the_files_as_they_were(directory: Path) -> None:
    first = trusting(directory)
    with Service(directory, *PAIR, "--tls-ca", "cert.pem") as service:
        first.load_cert_chain(directory / "cert.pem", directory / "key.pem")
        (directory / "cert.pem").write_text("half of a certificate")
        (directory / "key.pem").unlink()
        (pid,) = (one["pid"] for one in service.workers())
        os.kill(pid, signal.SIGKILL)
        service.stderr.wait_for("crash 1 in a row")
        service.wait_for_generations(1)
        ask(service, first).close()  # its replacement serves what its generation began with
        answer = service.ask({"type": "reload"})
        assert answer["exit_code"] == 3
        assert "key.pem: does not exist" in answer["message"]
        certificate(directory)
        second = trusting(directory)
        second.load_cert_chain(directory / "cert.pem", directory / "key.pem")
        assert service.ask({"type": "reload"})["exit_code"] == 0
        service.wait_for_generations(3)
        ask(service, second).close()
        assert service.ask({"type": "rollback"})["exit_code"] == 0
        service.wait_for_generations(4)
        ask(service, first).close()
        assert "PRIVATE" not in service.handoff("status", "--json").stdout


def test_clients_must_show_a_certificate_where_a_ca_is_given(directory: Path) -> None:
    certificate(directory, "client-", subject="client")
    with Service(directory, *PAIR, "--tls-ca", "client-cert.pem") as service:
        known = trusting(directory)
        known.load_cert_chain(directory / "client-cert.pem", directory / "client-key.pem")
        ask(service, known).close()
        with pytest.raises((ssl.SSLError, ConnectionError, EOFError)):
            ask(service, trusting(directory))


def test_reloads_lose_no_new_connection_of_tls(directory: Path) -> None:
    with Service(directory, *PAIR, "--workers", "2") as service:
        context = trusting(directory)
        with Clients(lambda: ask(service, context).close(), 4) as clients:
            for _ in range(3):
                assert service.ask({"type": "reload"})["exit_code"] == 0
                clients.more(20)
        clients.assert_none_failed()


def test_a_handshake_that_is_under_way_is_waited_for_in_a_drain(directory: Path) -> None:
    with Service(directory, *PAIR) as service:
        plain = socket.create_connection(("127.0.0.1", service.port), timeout=DEADLINE_SECONDS)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = trusting(directory).wrap_bio(incoming, outgoing, server_hostname="localhost")
        with plain:
            with pytest.raises(ssl.SSLWantReadError):
                client.do_handshake()
            hello = outgoing.read()
            plain.sendall(hello[:10])  # the worker has accepted it, and waits for the rest
            ask(service, trusting(directory)).close()
            assert service.ask({"type": "reload"})["exit_code"] == 0
            (worker,) = service.status(drain=True)["generations"][0]["workers"]
            assert worker["state"] == "draining"
            assert [hold["path"] for hold in worker["holds"]] == ["no TLS handshake yet"]
            plain.sendall(hello[10:])
            while True:
                incoming.write(plain.recv(65536))
                try:
                    client.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    plain.sendall(outgoing.read())
            plain.sendall(outgoing.read())
            client.write(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            plain.sendall(outgoing.read())
            answer = b""
            while b"https" not in answer:
                incoming.write(plain.recv(65536))
                try:
                    answer += client.read(65536)
                except ssl.SSLWantReadError:
                    continue
            assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--tls-cert", "cert.pem"), "tls_cert: needs tls_key, which is not given; give both"),
        (("--tls-key", "key.pem"), "tls_key: needs tls_cert, which is not given; give both"),
        (("--tls-cert", "gone.pem", "--tls-key", "key.pem"), "gone.pem: does not exist; create it or give another"),
        (("--tls-cert", "main.py", "--tls-key", "key.pem"), "are no certificate and key in PEM"),
        ((*PAIR, "--tls-ca", "main.py"), "main.py: holds no certificates in PEM"),
        (("--tls-cert", "cert.pem", "--tls-key", "locked.pem"), "tls-key: is encrypted, and nobody is there to type"),
    ],
)
def test_bad_files_end_the_start_with_one_line(directory: Path, arguments: tuple[str, ...], problem: str) -> None:
    command = ["openssl", "ec", "-in", "key.pem", "-aes256", "-passout", "pass:secret", "-out", "locked.pem"]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)
    with Service(directory, *arguments).launch() as service:
        assert service.wait() in (1, 2)
        said = service.stderr.finish()
        assert problem in said
        assert "Traceback" not in said


def test_two_ways_of_saying_it_are_refused(directory: Path) -> None:
    (directory / "handoff.toml").write_text('[uvicorn]\nssl_certfile = "cert.pem"\nssl_keyfile = "key.pem"\n')
    with Service(directory, *PAIR).launch() as service:
        assert service.wait() == 1
        assert "tls-cert and [uvicorn] ssl_*: say the same thing twice; leave one out" in service.stderr.finish()
