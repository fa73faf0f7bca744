"""Two hosts, a balancer and a rollout, all on this machine: `python examples/two_hosts/demo.py`.

It copies this directory to a temporary one, starts two services and the balancer, deploys v2, then a version that is
broken, then goes back to v1; and all the time a client asks. It ends with what the client saw.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
HANDOFF = [sys.executable, "-P", "-m", "handoff"]
SECONDS = 60


class Demo:
    """The whole of it, below one directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._environment = {
            **os.environ,
            "HANDOFF_HOST_STATE": str(root / "state"),
            "RUNTIME_DIRECTORY": str(root / "run"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        }
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self) -> int:
        """Both hosts with v1, and the balancer. Returns its port."""
        text = (HERE / "lb.toml").read_text().replace("ROOT", str(self._root)).replace(":8080", ":0")
        (self._root / "shop.py").write_text((HERE / "shop.py").read_text())
        for number in (1, 2):
            release = self._root / f"web{number}" / "releases" / "v1"
            release.mkdir(parents=True)
            (release / "shop.py").write_text((HERE / "shop.py").read_text().replace("@VERSION@", "v1"))
            (self._root / f"web{number}" / "current").symlink_to("releases/v1")
            place = str(self._root / f"web{number}" / "current")
            words = ["--name", f"web{number}", "--chdir", place, "--bind", "127.0.0.1:0", "--check", "/health"]
            port = self._serve(f"web{number}", "run", "shop:app", *words)
            text = text.replace(f":900{number}", f":{port}")
        (self._root / "lb.toml").write_text(text)
        (self._root / "deploy.toml").write_text((HERE / "deploy.toml").read_text().replace("ROOT", str(self._root)))
        return self._serve("edge", "lb", "run", "lb.toml")

    def _serve(self, name: str, *words: str) -> int:
        """A service that is up. Returns its port."""
        log = self._root / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*HANDOFF, *words], cwd=self._root, env=self._environment, stdout=output, stderr=output
            )
        self._running.append(process)
        while True:
            done = subprocess.run(
                [*HANDOFF, "status", "--name", name, "--json"], env=self._environment, capture_output=True, check=False
            )
            if done.returncode == 0 and (listeners := self._listeners(json.loads(done.stdout))):
                return int(listeners[0]["address"].rpartition(":")[2])
            if process.poll() is not None:
                raise SystemExit(f"{name} ended with status {process.returncode}:\n{log.read_text()}")

    @staticmethod
    def _listeners(status: dict[str, Any]) -> list[dict[str, Any]]:
        workers = [one for generation in status["generations"] for one in generation["workers"]]
        ready = [one for one in workers if one["state"] == "accepting"]
        return list(status["listeners"]) if ready else []

    def deploy(self, *words: str) -> int:
        """`handoff deploy …`; its exit code."""
        print(f"\n$ handoff deploy {' '.join(words)}", flush=True)
        done = subprocess.run([*HANDOFF, "deploy", *words], cwd=self._root, env=self._environment, check=False)
        print(f"exit code {done.returncode}", flush=True)
        return done.returncode

    def stop(self) -> None:
        for process in reversed(self._running):
            process.terminate()
        for process in self._running:
            process.wait(SECONDS)


class Client(threading.Thread):
    """Asks as long as it lives, on a new connection each time."""

    def __init__(self, port: int) -> None:
        super().__init__(name="client")
        self._port = port
        self._ends = threading.Event()
        self.answers: Counter[str] = Counter()

    def run(self) -> None:
        while not self._ends.is_set():
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=SECONDS)
                connection.request("GET", "/")
                answer = connection.getresponse()
                body = answer.read().decode().strip()
                self.answers[body if answer.status == 200 else f"failed: status {answer.status}"] += 1
                connection.close()
            except (OSError, http.client.HTTPException) as error:
                self.answers[f"failed: {type(error).__name__}"] += 1

    def end(self) -> None:
        self._ends.set()
        self.join()


def main() -> int:
    """0 where everything went as it should."""
    root = Path(tempfile.mkdtemp(prefix="two-hosts-"))
    demo = Demo(root)
    try:
        client = Client(demo.start())
        client.start()
        try:
            codes = [demo.deploy("plan", "v2"), demo.deploy("v2", "--yes"), demo.deploy("broken", "--yes")]
            codes += [demo.deploy("rollback"), demo.deploy("history")]
        finally:
            client.end()
    finally:
        demo.stop()
        shutil.rmtree(root)
    failed = sum(count for answer, count in client.answers.items() if answer.startswith("failed"))
    print(f"\nthe client saw: {dict(client.answers)}; failed: {failed}")
    return 0 if codes == [0, 0, 3, 0, 0] and not failed and set(client.answers) == {"v1", "v2"} else 1


if __name__ == "__main__":
    raise SystemExit(main())
