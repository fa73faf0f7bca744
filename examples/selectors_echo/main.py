"""A blocking program on `selectors`: it echoes, says when it is ready, and drains when it is told to.

handoff run main:main --chdir examples/selectors_echo --bind 127.0.0.1:7000
"""

from __future__ import annotations

import selectors
import socket

from handoff import Worker


def main(worker: Worker) -> None:
    listener = worker.listeners["default"]
    if not worker.ready():  # waits for the commit; False: this generation will not be live
        return
    open_connections: set[socket.socket] = set()
    with selectors.DefaultSelector() as selector:
        selector.register(worker, selectors.EVENT_READ)
        selector.register(listener, selectors.EVENT_READ)
        is_accepting = True
        while is_accepting or open_connections:
            for key, _ in selector.select(worker.drain_seconds):
                if key.fileobj is worker:
                    worker.wait(0)
                elif key.fileobj is listener:
                    accept(listener, selector, open_connections)
                else:
                    echo(key.fileobj, selector, open_connections)
            if worker.draining and is_accepting:
                is_accepting = False
                selector.unregister(listener)  # unregister first, then close: epoll would keep a ghost
                listener.close()
            if worker.drain_seconds == 0:
                return


def accept(listener: socket.socket, selector: selectors.BaseSelector, connections: set[socket.socket]) -> None:
    try:
        connection, _ = listener.accept()
    except BlockingIOError:  # a sibling was quicker
        return
    connections.add(connection)
    selector.register(connection, selectors.EVENT_READ)


def echo(connection: socket.socket, selector: selectors.BaseSelector, connections: set[socket.socket]) -> None:
    try:
        data = connection.recv(65536)
    except ConnectionError:
        data = b""
    if data:
        connection.sendall(data)  # an echo of this size never blocks for long; a real server would buffer
        return
    selector.unregister(connection)
    connections.discard(connection)
    connection.close()
