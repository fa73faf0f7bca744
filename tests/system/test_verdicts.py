"""However a reload goes wrong: one verdict with a reason, the old generation serves on, and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import site
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.system.apps import gated, hello, workbench
from tests.system.harness import Clients, Service, read_response, wait_until

CONFIG = 'app = "main:app"\nname = "web"\nworkers = 2\nprobation = "50ms"\n'


class Case(NamedTuple):
    """One way to break a release: what is in main.py and in handoff.toml, and what the operator must read."""

    name: str
    code: str
    reason: str
    config: str = CONFIG
    traceback: str = ""


def checked(check: str, more: str = "") -> str:
    return f'{CONFIG}check = "{check}"\n{more}'


LIFESPAN_FAILED = """
async def app(scope, receive, send):
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no database here"})
"""
LIFESPAN_RAISES = """
import traceback
async def app(scope, receive, send):
    await receive()
    try:
        raise RuntimeError("no database here")
    except RuntimeError:
        await send({"type": "lifespan.startup.failed", "message": traceback.format_exc()})
        raise
"""
DIES_AFTER_READY = (
    hello("9")
    + """
import threading, time
serve = app
async def app(scope, receive, send):
    if scope["type"] == "http":
        threading.Timer(0.3, os._exit, [3]).start()
    await serve(scope, receive, send)
"""
)
ANSWERS_500 = """
async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"the URLconf is broken"})
"""
HANGS = """
import asyncio
async def app(scope, receive, send):
    if scope["type"] == "http":
        await asyncio.Event().wait()
"""

CASES = [
    Case("missing_module", hello("9"), "no module named absent", CONFIG.replace("main:app", "absent:app")),
    Case("syntax_error", "def app(:\n", r"main\.py:1: SyntaxError", traceback=r"def app\(:"),
    Case("exception_at_import", "1 / 0\n", "ZeroDivisionError", traceback=r'main\.py", line 1'),
    Case("missing_import", "import absent\n", "ModuleNotFoundError: No module named 'absent'", traceback=r"main\.py"),
    Case("missing_attribute", "apt = app2 = print\n", r"has no attribute app; did you mean ap\w+\?"),
    Case("attribute_not_callable", "app = 3\n", "a int is not callable"),
    Case("lifespan_failed", LIFESPAN_FAILED, "lifespan start-up failed: .*no database here"),
    Case("lifespan_raises", LIFESPAN_RAISES, "RuntimeError: no database here", traceback=r'main\.py", line 6'),
    Case("exit_at_import", "import sys\nsys.exit(4)\n", r"called sys\.exit\(4\)", traceback=r'main\.py", line 2'),
    Case("hard_exit_at_import", "import os\nos._exit(5)\n", "exited with status 5 while it was loading"),
    Case(
        "import_that_blocks",
        "import time\n\ntime.sleep(1000)\n",
        "not ready after .* it was (starting the interpreter|loading the application)",  # on a busy machine the former
        CONFIG + 'boot_timeout = "8s"\n',
        r'main\.py", line 3',
    ),
    Case(
        "ready_and_then_dead",
        DIES_AFTER_READY,
        "exited with status 3",
        checked("/").replace('"50ms"', '"60s"'),
    ),
    Case("check_answers_500", ANSWERS_500, "check /here: answered 500: the URLconf is broken", checked("/here")),
    Case("check_hangs", HANGS, "check /: no answer within 0.2 s", checked("/", 'check_timeout = "200ms"\n')),
    Case("warm_up_fails", ANSWERS_500, "warm-up /warm: answered 500", CONFIG + 'warm_up = ["/warm"]\n'),
    Case("config_syntax", hello("9"), r"handoff\.toml: line 1: ", "workers = = 3\n"),
    Case("config_unknown_key", hello("9"), 'unknown key "worker"; did you mean "workers"', CONFIG + "worker = 3\n"),
    Case(
        "config_other_name",
        hello("9"),
        r"name: cannot change in a reload \(web, now api\)",
        CONFIG.replace("web", "api"),
    ),
    Case(
        "uvicorn_value_of_another_type",
        hello("9"),
        r"\[uvicorn\]: ws_max_size = 'big': uvicorn takes another kind of value: expected `int`, got `str`",
        CONFIG + '[uvicorn]\nws_max_size = "big"\n',
    ),
    Case("config_bad_value", hello("9"), "workers = 0: ", CONFIG.replace("workers = 2", "workers = 0")),
]


class Bench:
    """One service that all the cases break, with strict clients that never stop."""

    def __init__(self, service: Service, clients: Clients) -> None:
        self.service = service
        self.clients = clients
        self.pids = self._pids()
        self.fds = self._fds()

    def _pids(self) -> set[int]:
        return {process.pid for process in self.service.family()}

    def _fds(self) -> int:
        return len(os.listdir(f"/proc/{self.service.pid}/fd"))

    def write(self, code: str, config: str) -> None:
        (self.service.directory / "main.py").write_text(code)
        (self.service.directory / "handoff.toml").write_text(config)

    def break_with(self, code: str, config: str) -> subprocess.CompletedProcess[str]:
        """Reload what is broken, and see that nothing else happened."""
        self.write(code, config)
        try:
            done = self.service.reload()
        finally:
            self.write(hello("1"), CONFIG)
        assert done.returncode == 3, done
        assert "rolled back" in done.stderr
        assert "generation 1 stays live" in done.stderr
        wait_until(lambda: self._pids() == self.pids, "no processes are left behind")
        wait_until(lambda: self._fds() == self.fds, "no fds are left behind")
        self.clients.more(5)
        self.clients.assert_none_failed()
        status = self.service.status()
        assert status["live"] == 1
        assert [one["generation"] for one in status["generations"]] == [1]
        assert status["last_verdict"]["exit_code"] == 3
        return done


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    directory = tmp_path_factory.mktemp("verdicts") / "app"
    directory.mkdir()
    (directory / "main.py").write_text(hello("1"))
    (directory / "handoff.toml").write_text(CONFIG)

    def get() -> None:
        assert service.get()[2] == b"1"

    service = Service(directory, app=None, name="web", probation=None)
    index = service.arguments.index("--name")
    del service.arguments[index : index + 2]  # a name on the command line would win over the file's
    with service:
        with Clients(get, 3) as clients:
            yield Bench(service, clients)
        clients.assert_none_failed()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_broken_release_is_rolled_back_with_its_reason(bench: Bench, case: Case) -> None:
    done = bench.break_with(case.code, case.config)
    *traceback, verdict = done.stderr.rstrip().splitlines()
    assert re.search(case.reason, verdict), done.stderr
    if case.traceback:
        assert re.search(case.traceback, "\n".join(traceback)), done.stderr
    else:
        assert not traceback, "the application's code is not at fault"


def test_a_taken_port_is_refused_with_its_holder(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        config = f'{CONFIG}bind = ["127.0.0.1:0", "other=127.0.0.1:{port}"]\n'
        directory = bench.service.directory.parent / "taken"
        directory.mkdir(exist_ok=True)
        (directory / "main.py").write_text(hello("1"))
        (directory / "handoff.toml").write_text(f'{CONFIG}bind = "127.0.0.1:0"\n')
        with Service(directory, app=None, bind=None, probation=None) as service, Clients(service.get, 2) as clients:
            (directory / "handoff.toml").write_text(config)
            done = service.reload()
            assert done.returncode == 3
            assert f"listener other: 127.0.0.1:{port} is in use by" in done.stderr
            assert f"pid {os.getpid()}" in done.stderr
            clients.more(5)
        clients.assert_none_failed()


def test_a_port_that_the_application_binds_itself_is_named(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (directory / "main.py").write_text(
        f'import socket\nown = socket.create_server(("127.0.0.1", {port}))\n' + hello("1")
    )
    with Service(directory) as service, Clients(service.get, 2) as clients:
        done = service.reload()
        assert done.returncode == 3
        assert f"port {port} is held by worker process {service.workers()[0]['pid']}" in done.stderr
        assert f"--bind metrics=:{port}" in done.stderr
        clients.more(5)
    clients.assert_none_failed()


# --- a stop in between ----------------------------------------------------------------------------------------------


def test_term_during_the_first_boot_ends_it_at_once(directory: Path) -> None:
    (directory / "main.py").write_text(gated("1"))
    with Service(directory, "-w", "2").launch() as service:
        wait_until((directory / "importing").exists, "the first boot goes on")
        waiting = service.begin({"type": "reload"})
        service.status()
        service.signal(signal.SIGTERM)
        answer = waiting.answer()
        assert answer["exit_code"] == 7
        assert "the service is stopping" in answer["message"]
        assert service.wait() == 0
        assert not service.run_dir.exists() or not any(service.run_dir.iterdir())


def test_term_during_a_reload_aborts_it_and_loses_nothing(directory: Path) -> None:
    (directory / "main.py").write_text(workbench("1"))
    with Service(directory) as service:
        with service.connect() as held:
            held.sendall(b"GET /until?release HTTP/1.1\r\nHost: test\r\n\r\n")
            wait_until((directory / "release.began").exists, "a request is in progress")
            (directory / "main.py").write_text(gated("2"))
            waiting = subprocess.Popen(
                [*service.command, "reload", "--name", service.name, "--run-dir", str(service.run_dir)],
                cwd=directory,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            wait_until((directory / "importing").exists, "the reload boots")
            service.signal(signal.SIGTERM)
            _, errors = waiting.communicate(timeout=60)
            assert waiting.returncode == 7
            assert "aborted: the service is stopping" in errors
            (directory / "release").touch()
            assert read_response(held)[2] == b"1"
        assert service.wait() == 0


# --- rollbacks ------------------------------------------------------------------------------------------------------


def test_a_rollback_without_a_previous_generation_is_refused(directory: Path) -> None:
    with Service(directory) as service:
        done = service.handoff("rollback")
        assert done.returncode == 9
        assert "no previous generation" in done.stderr
        assert service.status()["live"] == 1


def test_a_rollback_during_a_reload_aborts_the_reload(directory: Path) -> None:
    with Service(directory, "-w", "2") as service, Clients(service.get, 2) as clients:
        (directory / "main.py").write_text(gated("2"))
        reload = service.begin({"type": "reload"})
        wait_until((directory / "importing").exists, "the reload boots")
        done = service.handoff("rollback")
        assert done.returncode == 0, done.stderr
        assert "generation 1 stays live" in done.stdout
        assert reload.answer()["exit_code"] == 7
        service.wait_for_generations(1)
        assert service.get()[2] == b"1"
    clients.assert_none_failed()


class Releases:
    """Release directories, each with its own virtual environment, behind the link `current`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.link = root / "current"

    def make(self, name: str, code: str) -> Path:
        release = self.root / "releases" / name
        environment = release / ".venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
        packages = next(environment.glob("lib/python*/site-packages"))
        # Not only the directory: handoff may be installed there as a link (a .pth of its own).
        lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
        (packages / "borrowed.pth").write_text("\n".join(lines) + "\n")
        (release / "main.py").write_text(code)
        return release

    def switch(self, release: Path) -> None:
        new = self.root / "new"
        new.symlink_to(release)
        new.rename(self.link)


@pytest.fixture
def releases(tmp_path: Path) -> Releases:
    return Releases(tmp_path)


def released(service: Service) -> str:
    """The version that answers, from its own directory with its own interpreter."""
    where = json.loads(service.get("/where")[2])
    assert where["prefix"] == where["directory"] + "/.venv"
    assert where["directory"].endswith(f"/releases/{where['version']}")
    return str(where["version"])


def test_releases_with_their_own_environments_are_switched_rolled_back_and_deleted(releases: Releases) -> None:
    first = releases.make("1", workbench("1"))
    releases.switch(first)
    options = ["--chdir", str(releases.link), "--python", str(releases.link / ".venv/bin/python")]
    with Service(releases.root, *options) as service, ExitStack() as stack:
        clients = stack.enter_context(Clients(service.get, 2))
        assert released(service) == "1"
        second = releases.make("2", workbench("2"))
        releases.switch(second)
        assert service.ask({"type": "reload", "label": "v2"})["exit_code"] == 0
        service.wait_for_generations(2)
        assert released(service) == "2"

        rolled_back = service.handoff("rollback")
        assert rolled_back.returncode == 0, rolled_back.stderr
        service.wait_for_generations(3)
        assert released(service) == "1"  # the link still leads to 2
        assert service.ask({"type": "reload"})["exit_code"] == 0
        service.wait_for_generations(4)
        assert released(service) == "2"

        shutil.rmtree(first)
        refused = service.handoff("rollback")
        assert refused.returncode == 3
        assert re.search(r"directory .*/releases/1: is gone, so there is nothing to roll back to", refused.stderr)
        assert released(service) == "2"
        assert service.ask({"type": "reload"})["exit_code"] == 0
        assert released(service) == "2"
        stack.close()
        clients.assert_none_failed()


def test_a_crash_after_a_rolled_back_reload_respawns_the_old_code(releases: Releases) -> None:
    releases.switch(releases.make("1", workbench("1")))
    options = ["--chdir", str(releases.link), "--python", str(releases.link / ".venv/bin/python")]
    with Service(releases.root, *options) as service:
        releases.switch(releases.make("2", "1 / 0\n"))
        assert service.ask({"type": "reload"})["exit_code"] == 3
        (before,) = service.workers()
        os.kill(before["pid"], signal.SIGKILL)

        def replaced() -> bool:
            return [one["state"] for one in service.workers() if one["pid"] != before["pid"]] == ["accepting"]

        wait_until(replaced, "the worker is replaced")
        assert released(service) == "1"
        assert service.status()["live"] == 1
