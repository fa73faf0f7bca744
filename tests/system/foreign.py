"""Commands of any language for tests: how they are found and started, and one that speaks sd_notify(3)."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from tests.system.harness import Service

SPEAKER = """
import os, selectors, signal, socket, sys

def say(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect("\\0" + os.environ["NOTIFY_SOCKET"][1:])
        notify.send(text.encode())

assert os.environ["LISTEN_PID"] == str(os.getpid())
count = int(os.environ["LISTEN_FDS"])
assert len(os.listdir("/proc/self/fd")) == 3 + count + 1, os.listdir("/proc/self/fd")
selector, told = selectors.DefaultSelector(), socket.socketpair()
told[1].setblocking(False)
signal.set_wakeup_fd(told[1].fileno())
signal.signal(signal.SIGTERM, lambda *_: None)
selector.register(told[0], selectors.EVENT_READ, None)
for fd in range(3, 3 + count):
    listener = socket.socket(fileno=fd)
    listener.setblocking(False)
    selector.register(listener, selectors.EVENT_READ, listener)
say("STATUS=loading the model")
if sys.argv[1:] == ["hang"]:
    signal.pause()
if sys.argv[1:] == ["exit"]:
    sys.exit(3)
say("READY=1\\nSTATUS=serving")
while True:
    for key, _ in selector.select():
        if key.data is None:
            sys.exit(0)
        try:
            connection, _ = key.data.accept()
        except BlockingIOError:
            continue
        with connection:
            connection.setblocking(True)
            connection.recv(65536)
            body = f"{os.environ['HANDOFF_GENERATION']} {os.environ['LISTEN_FDNAMES']}".encode()
            head = b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\nConnection: close\\r\\n\\r\\n" % len(body)
            connection.sendall(head + body)
"""


def peer(name: str) -> str:
    """A program that .ci/run installs."""
    found = shutil.which(name)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"{name} is missing; .ci/run installs it")
        pytest.skip(f"{name} is missing: install it (.ci/run names the packages)")
    return found


def command(directory: Path, *words: str, options: tuple[str, ...] = (), bind: str = "127.0.0.1:0") -> Service:
    return Service(directory, *options, "--", *words, app=None, bind=bind)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def reload(service: Service) -> None:
    done = service.ask({"type": "reload"})
    assert done["exit_code"] == 0, done
