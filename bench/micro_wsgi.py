"""Flask hello through one worker: the WSGI bridge beside a2wsgi on the same uvicorn, and gunicorn gthread.

    python bench/micro_wsgi.py [--rounds 3] [--seconds 5] [--connections 32] [--threads 10] [--only NAME ...]

Needs wrk. Rounds are interleaved, so that a slow minute of the machine hits all alike; medians are printed.
CPU time per request (the server's processes, user and system) is what a busy machine disturbs least.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import psutil
from flask import Flask

HERE = Path(__file__).resolve()
SERVERS = ("bridge", "bridge-asyncio", "a2wsgi", "gunicorn-gthread", "uvicorn-asgi")
START_TIMEOUT_SECONDS = 20.0

application = Flask(__name__)


@application.get("/")
def hello() -> str:
    return "Hello, world!\n"


async def bare(scope: dict[str, object], receive: object, send: object) -> None:
    """The same answer from ASGI without Flask: what uvicorn alone can do."""
    headers = [(b"content-type", b"text/html; charset=utf-8"), (b"content-length", b"14")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})  # type: ignore[operator]
    await send({"type": "http.response.body", "body": b"Hello, world!\n"})  # type: ignore[operator]


def serve(name: str, fd: int, threads: int) -> None:
    """In a process of its own: serve on the inherited listener until it is told to stop."""
    sys.path.insert(0, str(HERE.parent.parent))
    if name == "gunicorn-gthread":
        options = ["--worker-class=gthread", f"--threads={threads}", f"--bind=fd://{fd}", "--keep-alive=75"]
        command = [sys.executable, "-m", "gunicorn", *options, "--log-level=warning", f"{HERE.stem}:application"]
        os.chdir(HERE.parent)
        os.execv(sys.executable, command)
    import uvicorn
    from a2wsgi import WSGIMiddleware

    from handoff.worker.wsgi import WSGIBridge

    app: object = bare
    if name == "a2wsgi":
        app = WSGIMiddleware(application, workers=threads)  # type: ignore[arg-type]
    elif name.startswith("bridge"):
        app = WSGIBridge(application, threads=threads, logger=logging.getLogger("uvicorn.error"))
    loop = "asyncio" if name.endswith("asyncio") else "uvloop"
    uvicorn.run(app, fd=fd, http="httptools", ws="none", loop=loop, log_level="warning", access_log=False)  # type: ignore[arg-type]


class Server:
    """One server process on a listener of ours; a request that comes early waits in the backlog."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        # Connections inherit it. A server that takes the listener for a unix socket does not set it, and then head
        # and body, sent apart, meet Nagle and delayed acknowledgements: 6 requests/s instead of 6,000 were seen.
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        fd = self._listener.fileno()
        command = [sys.executable, str(HERE), "--serve", name, "--fd", str(fd), "--threads", str(threads)]
        self._process = subprocess.Popen(command, pass_fds=(fd,))

    def wait(self) -> None:
        with urlopen(self.url, timeout=START_TIMEOUT_SECONDS) as answer:
            assert answer.status == 200

    def cpu_seconds(self) -> float:
        process = psutil.Process(self._process.pid)
        times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
        return float(sum(one.user + one.system for one in times))

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(START_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.close()


class Load(NamedTuple):
    rate: float  # requests/s
    cpu_microseconds: float  # per request
    tail: str  # p99 as wrk prints it, and whether any request failed


def load(server: Server, seconds: int, connections: int) -> Load:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", server.url]
    before = server.cpu_seconds()
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 30).stdout
    used = server.cpu_seconds() - before
    rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
    count = re.search(r"(\d+) requests in", output)
    tail = re.search(r"99%\s+(\S+)", output)
    assert rate is not None and count is not None and tail is not None, output  # noqa: PT018
    has_failed = "Non-2xx" in output or "Socket errors" in output
    return Load(float(rate[1]), used / max(1, int(count[1])) * 1e6, tail[1] + (" FAILED" if has_failed else ""))


def measure(options: argparse.Namespace) -> None:
    print(f"# {platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"# wrk -t1 -c{options.connections} -d{options.seconds}s, {options.rounds} rounds, {options.threads} threads")
    print(f"# load average before: {', '.join(f'{value:.1f}' for value in os.getloadavg())}")
    servers = [Server(name, options.threads) for name in options.only or SERVERS]
    loads: dict[str, list[Load]] = {server.name: [] for server in servers}
    try:
        for server in servers:
            server.wait()
            load(server, 1, options.connections)
        for _ in range(options.rounds):
            for server in servers:
                loads[server.name].append(load(server, options.seconds, options.connections))
    finally:
        for server in servers:
            server.stop()
    show(loads)


def show(loads: dict[str, list[Load]]) -> None:
    rates = {name: statistics.median(one.rate for one in rounds) for name, rounds in loads.items()}
    base = rates.get("gunicorn-gthread", 0.0)
    for name, rounds in loads.items():
        cpu = statistics.median(one.cpu_microseconds for one in rounds)
        ratio = f"{rates[name] / base:5.2f} x gthread" if base else ""
        tails = ", ".join(one.tail for one in rounds)
        print(f"{name:18} {rates[name]:7.0f} req/s  {ratio}  {cpu:6.0f} us CPU/req  p99 {tails}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--threads", type=int, default=10)
    parser.add_argument("--only", nargs="*", choices=SERVERS)
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.fd, options.threads)
    else:
        measure(options)


if __name__ == "__main__":
    main()
