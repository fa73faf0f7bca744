"""A server of datagrams, of the kind that DNS is: each one is answered, over reloads too.

handoff run main:main --chdir examples/udp_echo --bind udp:127.0.0.1:7002

All workers, those of the new generation and those of the old, read from the same socket, which the master holds: what
reached it waits there for whoever reads next. So a worker that is asked to drain just stops reading.
"""

from __future__ import annotations

import selectors
import socket

from handoff import Worker

MAXIMUM_BYTES = 65535
AT_ONCE = 64


def main(worker: Worker) -> None:
    listener = worker.listeners["default"]
    if not worker.ready():  # waits for the commit; False: this generation will not be live
        return
    with selectors.DefaultSelector() as selector:
        selector.register(worker, selectors.EVENT_READ)
        selector.register(listener, selectors.EVENT_READ)
        while not worker.wait(0):
            selector.select()
            answer_some(listener)


def answer_some(listener: socket.socket) -> None:
    """What is there, but not for ever: the master may have something to say."""
    for _ in range(AT_ONCE):
        try:
            data, client = listener.recvfrom(MAXIMUM_BYTES)
        except BlockingIOError:  # a sibling was quicker
            return
        try:
            listener.sendto(data, client)
        except OSError:  # the client's port is closed, or there is no room: datagrams may be lost on their way
            continue
