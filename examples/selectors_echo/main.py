"""A blocking program on `selectors`: it echoes, says when it is ready, and hands its connections over at a drain, and
to siblings that have fewer.

handoff run main:main --chdir examples/selectors_echo --bind 127.0.0.1:7000
"""

from __future__ import annotations

import selectors
import socket

from handoff import Worker

RETRY_SECONDS = 0.05
BALANCE_SECONDS = 0.2


def main(worker: Worker) -> None:
    listener = worker.listeners["default"]
    # It waits for the commit; False: this generation will not be live.
    if not worker.ready(adopts=True, tells_closed=True):
        return
    connections: set[socket.socket] = set()
    with selectors.DefaultSelector() as selector:
        selector.register(worker, selectors.EVENT_READ)
        selector.register(listener, selectors.EVENT_READ)
        is_accepting = True
        while is_accepting or connections:
            for key, _ in selector.select(RETRY_SECONDS if worker.draining else BALANCE_SECONDS):
                if key.fileobj is worker:
                    worker.wait(0)
                elif key.fileobj is listener:
                    accept(listener, selector, connections)
                else:
                    echo(key.fileobj, selector, connections)
            for (connection,), _state in worker.adopted():  # an echo has no state
                add(connection, selector, connections)
            worker.connections = len(connections)
            if worker.draining and is_accepting:
                is_accepting = False
                selector.unregister(listener)  # unregister first, then close: epoll would keep a ghost
                listener.close()
                worker.closed()
            if worker.can_hand_over:
                hand_over(worker, selector, connections, len(connections))
            elif surplus := worker.surplus():
                hand_over(worker, selector, connections, surplus)
            if worker.drain_seconds == 0:
                return


def accept(listener: socket.socket, selector: selectors.BaseSelector, connections: set[socket.socket]) -> None:
    try:
        connection, _ = listener.accept()
    except BlockingIOError:  # a sibling was quicker
        return
    add(connection, selector, connections)


def add(connection: socket.socket, selector: selectors.BaseSelector, connections: set[socket.socket]) -> None:
    connections.add(connection)
    selector.register(connection, selectors.EVENT_READ)


def drop(connection: socket.socket, selector: selectors.BaseSelector, connections: set[socket.socket]) -> None:
    selector.unregister(connection)
    connections.discard(connection)
    connection.close()


def echo(connection: socket.socket, selector: selectors.BaseSelector, connections: set[socket.socket]) -> None:
    try:
        data = connection.recv(65536)
    except ConnectionError:
        data = b""
    if data:
        connection.sendall(data)  # an echo of this size never blocks for long; a real server would buffer
    else:
        drop(connection, selector, connections)


def hand_over(worker: Worker, selector: selectors.BaseSelector, connections: set[socket.socket], count: int) -> None:
    """Between two reads everything is answered: each connection may go. What is in the kernel goes along."""
    for connection in list(connections)[:count]:
        if worker.hand_over([connection.fileno()]):
            drop(connection, selector, connections)
