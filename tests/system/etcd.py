"""Real etcd nodes on free ports of this machine, each with its own directory."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.system.foreign import free_port, peer
from tests.system.harness import DEADLINE_SECONDS, wait_until

MAXIMUM_TRIES = 5
"""A port that was free may be somebody else's a moment later."""


class Node:
    """Owns a process. `options`: of etcd, on top."""

    def __init__(
        self,
        directory: Path,
        name: str,
        options: tuple[str, ...] = (),
        scheme: str = "http",
        host: str = "127.0.0.1",
        place: tuple[str, ...] = (),
    ) -> None:
        """`host`: its own address; `place`: the words before a command that runs where that is."""
        self.name, self.client_port, self.peer_port = name, free_port(), free_port()
        self.scheme, self.host, self._place = scheme, host, place
        self._directory = directory / f"{name}-{self.client_port}"
        self._directory.mkdir(mode=0o700, parents=True)
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def peer_url(self) -> str:
        return f"http://{self.host}:{self.peer_port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, cluster: str) -> None:
        client_url = f"{self.scheme}://{self.host}:{self.client_port}"
        words = [*self._place, peer("etcd"), "--name", self.name, "--data-dir", str(self._directory), "--logger", "zap"]
        words += ["--listen-client-urls", client_url, "--advertise-client-urls", client_url]
        words += ["--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url]
        words += ["--initial-cluster", cluster, *self._options]
        environ = {key: value for key, value in os.environ.items() if not key.startswith("ETCD_")}
        with open(self._directory.with_suffix(".log"), "ab") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log, env=environ)

    @property
    def has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(DEADLINE_SECONDS)

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Over plain HTTP, past everything that is being tested. Raises OSError."""
        connection = http.client.HTTPConnection(self.host, self.client_port, timeout=DEADLINE_SECONDS)
        with contextlib.closing(connection):
            connection.request("POST", path, json.dumps(body))
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
        return answer

    def is_leader(self) -> bool:
        try:
            status = self.ask("/v3/maintenance/status", {})
        except (OSError, http.client.HTTPException):
            return False
        return "leader" in status and status["leader"] == status["header"]["member_id"]

    def accepts(self) -> bool:
        connection = http.client.HTTPConnection(self.host, self.client_port, timeout=DEADLINE_SECONDS)
        with contextlib.suppress(OSError), contextlib.closing(connection):
            connection.connect()
            return True
        return False


class Cluster:
    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self._text = ",".join(f"{one.name}={one.peer_url}" for one in nodes)

    @property
    def url(self) -> str:
        return "etcd://" + ",".join(f"{one.host}:{one.client_port}" for one in self.nodes)

    def start(self, *nodes: Node) -> None:
        for node in nodes or self.nodes:
            node.start(self._text)

    def leader(self) -> Node:
        def found() -> Node | None:
            return next((one for one in self.nodes if not one.has_ended and one.is_leader()), None)

        leader: Node = wait_until(found, "etcd has a leader")
        return leader

    def kill(self) -> None:
        for node in self.nodes:
            with contextlib.suppress(ProcessLookupError):
                node.signal(signal.SIGCONT)
            node.kill()


@contextlib.contextmanager
def cluster(directory: Path, count: int = 1, options: tuple[str, ...] = (), scheme: str = "http") -> Iterator[Cluster]:
    """Nodes that accept, and with plain HTTP have a leader."""
    for _ in range(MAXIMUM_TRIES):
        made = Cluster([Node(directory, f"n{number}", options, scheme) for number in range(count)])
        try:
            made.start()
            nodes = made.nodes
            wait_until(
                lambda nodes=nodes: any(one.has_ended for one in nodes) or all(one.accepts() for one in nodes),
                "etcd accepts",
            )
            if not any(one.has_ended for one in nodes):
                if scheme == "http":
                    made.leader()
                yield made
                return
        finally:
            made.kill()
    raise AssertionError(f"etcd does not start; its logs are in {directory}")
