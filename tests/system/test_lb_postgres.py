"""PostgreSQL behind the balancer, asked by its own clients, while the balancer is reloaded."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.balancer import Balancer, config
from tests.system.harness import DEADLINE_SECONDS, Clients, wait_until
from tests.system.postgres import Postgres, program


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture
def service(postgres: Postgres, tmp_path: Path) -> Iterator[Balancer]:
    text = "[balancer]\nrelays = 2\n" + config({"main": [f'"127.0.0.1:{postgres.port}"']}, check='interval = "200ms"')
    with Balancer(tmp_path, text) as balancer:
        wait_until(lambda: all(one["is_eligible"] for one in balancer.backends().values()), "it is checked")
        yield balancer


def at(port: int) -> list[str]:
    return ["-h", "127.0.0.1", "-p", str(port), "-U", "tester"]


def run(*words: str) -> str:
    found = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


class Session:
    """One psql, whose connection stays."""

    def __init__(self, port: int) -> None:
        words = [program("psql"), *at(port), "-d", "postgres", "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1"]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ask(self, query: str) -> str:
        """The last line of the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{query};\n\\echo done\n")
        self.process.stdin.flush()
        found = [line.strip() for line in iter(self.process.stdout.readline, "done\n")]
        return found[-1]

    def close(self) -> tuple[int, str]:
        """Its exit code, and what it complained of."""
        _, stderr = self.process.communicate("", DEADLINE_SECONDS)
        return self.process.returncode, stderr


def test_transactions_and_sessions_go_on_while_relay_workers_are_replaced(
    postgres: Postgres, service: Balancer
) -> None:
    bench = [program("pgbench"), *at(service.port)]
    run(*bench, "--initialize", "--quiet", "postgres")
    session = Session(service.port)
    backend = session.ask("create temporary table mine as select 42 as answer; select pg_backend_pid()")

    def transactions() -> None:
        kept = run(*bench, "--no-vacuum", "--client=2", "--transactions=20", "postgres")
        anew = run(*bench, "--no-vacuum", "--client=2", "--transactions=5", "--connect", "postgres")
        for said, count in ((kept, 40), (anew, 10)):
            assert f"number of transactions actually processed: {count}/{count}" in said, said

    with Clients(transactions, 1) as clients:
        for _ in range(2):
            clients.more(1)
            assert service.ask({"type": "reload"})["exit_code"] == 0
            assert session.ask("select pg_backend_pid()") == backend
        clients.more(1)
    clients.assert_none_failed()
    assert session.ask("select answer from mine") == "42"
    assert session.close() == (0, "")
    psql = [program("psql"), *at(postgres.port), "-X", "-A", "-t", "-c"]
    sums = (
        "select count(*), coalesce(sum(delta), 0) = (select sum(abalance) from pgbench_accounts) from pgbench_history"
    )
    assert run(*psql, sums, "postgres") == f"{50 * clients.done}|t"


def test_bulk_both_ways_is_whole_over_reloads(postgres: Postgres, service: Balancer, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    with rows.open("w") as file:
        for number in range(40_000):
            file.write(f"{number}\t{os.urandom(250).hex()}\n")
    psql = [program("psql"), *at(service.port), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", "postgres"]
    into = f"create unlogged table bulk (id int, data text);\n\\copy bulk from '{rows}'"
    copying = subprocess.Popen([*psql, "-f", "-"], stdin=subprocess.PIPE, text=True)
    assert copying.stdin is not None
    copying.stdin.write(f"{into}\n")
    copying.stdin.close()
    while copying.poll() is None:
        assert service.ask({"type": "reload"})["exit_code"] == 0
    assert copying.returncode == 0
    back = tmp_path / "back"
    with back.open("wb") as file:
        copying = subprocess.Popen([*psql, "-c", "copy (select * from bulk order by id) to stdout"], stdout=file)
        while copying.poll() is None:
            assert service.ask({"type": "reload"})["exit_code"] == 0
    assert copying.returncode == 0
    assert back.read_bytes() == rows.read_bytes()


def test_a_query_is_cancelled_through_the_balancer(service: Balancer) -> None:
    """A cancel request is a connection of its own, whose client says something and hangs up."""
    session = Session(service.port)
    assert session.process.stdin is not None
    session.ask("select 1")
    session.process.stdin.write("select pg_sleep(3600);\n")
    session.process.stdin.flush()
    watcher = Session(service.port)
    sleeping = "select count(*) from pg_stat_activity where query like 'select pg_sleep%' and state = 'active'"
    while watcher.ask(sleeping) != "1":
        pass
    session.process.send_signal(signal.SIGINT)
    code, stderr = session.close()
    assert code == 3
    assert re.search("canceling statement due to user request", stderr)
    assert watcher.ask(sleeping) == "0"
    assert watcher.close() == (0, "")
