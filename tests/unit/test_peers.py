"""Clients of the master: large answers to slow and half-closed ones, and too many of them."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from handoff.master.log import MasterLog
from handoff.master.loop import Loop
from handoff.master.peers import MAXIMUM_PEERS, Peer, Peers

LARGE = bytes(range(256)) * 16384


class Server:
    """Answers each line with something large. Owns everything."""

    def __init__(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=MAXIMUM_PEERS * 2)
        listener.setblocking(False)
        self.address = listener.getsockname()
        self.loop, self.log = Loop(), MasterLog("text")
        self.peers = Peers(listener, self.loop, self.log, "test", 1000, self._received)

    def _received(self, peer: Peer) -> None:
        if b"\n" in peer.received:
            peer.has_asked = True
            self.peers.finish(peer.number, LARGE)

    def turn(self) -> None:
        self.loop.turn(1.0)

    def close(self) -> None:
        self.peers.close()
        self.loop.close()
        self.log.close()


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


def read_all(server: Server, client: socket.socket) -> bytes:
    client.setblocking(False)
    received = b""
    while True:
        try:
            data = client.recv(1 << 20)
        except BlockingIOError:
            server.turn()
            continue
        if not data:
            return received
        received += data


@pytest.mark.parametrize("ends", [False, True])
def test_a_large_answer_reaches_a_slow_client_even_when_it_has_half_closed(server: Server, ends: bool) -> None:
    with socket.create_connection(server.address) as client:
        client.sendall(b"question\n")
        if ends:
            client.shutdown(socket.SHUT_WR)
        server.turn()
        server.turn()
        assert read_all(server, client) == LARGE


def test_a_half_closed_client_that_does_not_read_costs_no_turns(server: Server) -> None:
    with socket.create_connection(server.address) as client:
        client.sendall(b"question\n")
        client.shutdown(socket.SHUT_WR)
        for _ in range(3):
            server.turn()
        called: list[object] = []
        serve = Peers._serve
        try:
            Peers._serve = lambda *args: called.append(args)  # type: ignore[method-assign]
            server.loop.turn(0.05)
        finally:
            Peers._serve = serve  # type: ignore[method-assign]
        assert called == []


def test_a_client_that_ends_without_asking_is_dropped(server: Server) -> None:
    with socket.create_connection(server.address) as client:
        client.sendall(b"half a quest")
        client.shutdown(socket.SHUT_WR)
        for _ in range(3):
            server.turn()
        assert client.recv(10) == b""


def test_too_long_a_request_is_refused(server: Server) -> None:
    with socket.create_connection(server.address) as client:
        client.sendall(b"x" * 1001)
        for _ in range(3):
            server.turn()
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(10) == b""


def test_one_more_than_the_maximum_drops_the_oldest_that_asked_nothing(server: Server) -> None:
    clients = [socket.create_connection(server.address) for _ in range(MAXIMUM_PEERS)]
    try:
        clients[0].sendall(b"question\n")
        for _ in range(MAXIMUM_PEERS + 2):
            server.turn()
        clients.append(socket.create_connection(server.address))
        server.turn()
        assert clients[1].recv(10) == b""
        assert read_all(server, clients[0]) == LARGE
    finally:
        for client in clients:
            client.close()
