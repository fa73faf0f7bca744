"""`handoff host`: commands that run once under an id, whatever becomes of who asked for them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from handoff.errors import ExitCode, HandoffError, UsageError
from lb.host.cli import main
from lb.host.operation import Operation, Request, Result, Started
from lb.host.state import ServiceState, prepared_root, state_root
from tests.system.harness import wait_until
from tests.unit.test_docs import ROOT, code_of, rows

SECONDS = 60


class Host:
    """`handoff host` with a state of its own."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "state"
        self.runs = directory / "runs"
        self.gate = directory / "gate"
        os.mkfifo(self.gate)
        self.waiting = ("sh", "-c", f"echo run >> {self.runs}; read word < {self.gate}; echo $word")
        """Counts its runs, and ends when it is told to."""

    def begin(self, *words: str, program: str = "from lb.host.cli import main; main()") -> subprocess.Popen[str]:
        environ = {**os.environ, "HANDOFF_HOST_STATE": str(self.root), "HANDOFF_LB_TOKEN": "secret"}
        command = [sys.executable, "-P", "-c", program, *words]
        return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def call(self, *words: str, **options: str) -> tuple[int, Any]:
        """The exit code, and the answer, or what is said about why there is none."""
        return ended(self.begin(*words, **options))

    def exec(
        self, *command: str, operation: str = "one", token: int = 1, options: tuple[str, ...] = ()
    ) -> tuple[int, Any]:
        return self.call(*words_of(operation, token, options), "--", *command)

    def begin_waiting(self, operation: str = "one", token: int = 1) -> subprocess.Popen[str]:
        """When this returns its command runs."""
        process = self.begin(*words_of(operation, token), "--", *self.waiting)
        wait_until(self.runs.exists, "the command runs")
        return process

    def end(self) -> None:
        self.gate.write_text("ended\n")

    @property
    def count(self) -> int:
        return len(self.runs.read_text().splitlines())

    def operation(self, operation: str = "one") -> Operation:
        return ServiceState(self.root, "shop").operation(operation)

    def started(self, operation: str = "one") -> Started:
        found = self.operation(operation).started()
        assert found is not None
        return found


def words_of(operation: str, token: int, options: tuple[str, ...] = ()) -> list[str]:
    return ["exec", "--service", "shop", "--token", str(token), "--operation", operation, *options]


def ended(process: subprocess.Popen[str]) -> tuple[int, Any]:
    output, errors = process.communicate(timeout=SECONDS)
    return process.returncode, json.loads(output) if output else errors


def kill(pid: int) -> None:
    """When this returns it is dead, if not reaped."""
    fd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        assert select.select([fd], [], [], SECONDS)[0]
    finally:
        os.close(fd)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


# --- once -----------------------------------------------------------------------------------------------------------


def test_a_command_runs_once_and_its_end_is_kept(host: Host) -> None:
    command = ("sh", "-c", f"echo run >> {host.runs}; echo out; echo err >&2; exit 3")
    code, first = host.exec(*command)
    assert (code, first["state"], first["exit_code"], first["output"]) == (1, "done", 3, "out\nerr\n")
    assert host.exec(*command) == (1, first)
    assert host.count == 1


def test_of_many_calls_at_once_one_runs_it_and_all_get_its_end(host: Host) -> None:
    calls = [host.begin(*words_of("one", 1), "--", *host.waiting) for _ in range(4)]
    host.end()
    answers = [ended(one) for one in calls]
    assert {code for code, _ in answers} == {0}
    assert {answer["output"] for _, answer in answers} == {"ended\n"}
    assert host.count == 1


def test_another_command_under_the_same_id_is_refused(host: Host) -> None:
    assert host.exec("true")[0] == 0
    code, said = host.exec("true", "really")
    assert code == ExitCode.REFUSED
    assert (
        said == "handoff: error: operation one: was another command under this id; give each command an id of its own\n"
    )


def test_who_does_not_wait_for_its_end_joins_it_later(host: Host) -> None:
    code, answer = host.exec(*host.waiting, options=("--timeout", "0s"))
    assert (code, answer["state"], answer["exit_code"]) == (4, "running", None)
    joined = host.begin(*words_of("one", 1), "--", *host.waiting)
    host.end()
    code, answer = ended(joined)
    assert (code, answer["state"], answer["output"]) == (0, "done", "ended\n")
    assert host.count == 1


def test_the_death_of_who_asked_changes_nothing(host: Host) -> None:
    asking = host.begin_waiting()
    os.kill(asking.pid, signal.SIGKILL)
    asking.communicate(timeout=SECONDS)
    joined = host.begin(*words_of("one", 1), "--", *host.waiting)
    host.end()
    assert ended(joined)[1]["output"] == "ended\n"
    assert host.count == 1


# --- what is lost ---------------------------------------------------------------------------------------------------


def test_a_lost_command_is_told_and_runs_again_only_where_that_is_asked_for(host: Host) -> None:
    asking = host.begin_waiting()
    started = host.started()
    kill(started.supervisor.pid)
    # Its supervisor is gone, the command is not: it still runs.
    assert host.exec(*host.waiting, options=("--timeout", "0s"))[0] == ExitCode.TIMED_OUT
    kill(started.command.pid)
    code, answer = ended(asking)
    assert (code, answer["state"], answer["exit_code"]) == (ExitCode.PARTIAL, "lost", None)
    assert host.exec(*host.waiting) == (code, answer)
    assert host.count == 1
    again = host.begin(*words_of("one", 1, ("--retry-lost",)), "--", *host.waiting)
    host.end()
    assert ended(again)[1]["output"] == "ended\n"
    assert host.count == 2


def test_after_a_restart_of_the_machine_no_process_is_taken_for_the_command(host: Host) -> None:
    assert host.exec("true")[0] == 0
    operation = host.operation()
    (operation.path / "result").unlink()
    us = psutil.Process()
    record = msgspec.structs.replace(host.started().command, pid=us.pid, boot="another")
    told = Started(command=record, supervisor=record, started=0.0)
    (operation.path / "started").write_bytes(msgspec.json.encode(told))
    assert host.exec("true")[1]["state"] == "lost"


def test_what_was_asked_for_and_never_started_is_started(host: Host) -> None:
    assert host.exec("true")[0] == 0
    operation = host.operation()
    for name in ("started", "result"):
        (operation.path / name).unlink()
    assert host.exec("true")[1]["state"] == "done"


# --- fencing --------------------------------------------------------------------------------------------------------


def test_a_token_older_than_the_newest_is_refused_whatever_is_asked(host: Host) -> None:
    assert host.exec("true", token=5)[0] == 0
    assert host.exec("true", token=5, operation="two")[0] == 0
    expected = (
        "handoff: error: service shop: is fenced: token 4 is older than 5, which this host has seen: "
        "another deployer has the lock\n"
    )
    assert host.exec("true", token=4, operation="three") == (ExitCode.ABORTED, expected)
    assert host.exec("true", token=4) == (ExitCode.ABORTED, expected)
    assert host.call("stop", *words_of("one", 4)[1:]) == (ExitCode.ABORTED, expected)
    assert host.operation("three").request() is None


def test_the_command_of_a_fenced_deployer_ends_before_the_next_one_starts(host: Host) -> None:
    asking = host.begin_waiting(operation="old", token=1)
    code, said = host.exec("true", token=2, operation="new", options=("--timeout", "0s"))
    assert code == ExitCode.LOCKED
    assert "service shop: operation old of the older token 1 still runs here for " in said
    assert "; wait for it, or handoff host stop it" in said
    waiting = host.begin(*words_of("new", 2), "--", "cat", str(host.runs))
    host.end()
    assert ended(waiting)[1]["output"] == "run\n"
    assert ended(asking)[1]["output"] == "ended\n"


def test_a_token_that_cannot_be_read_lets_nobody_in(host: Host) -> None:
    assert host.exec("true")[0] == 0
    (host.root / "shop" / "token").write_text("")
    code, said = host.exec("true", operation="two")
    assert (code, "holds no token; write the highest that was used into it" in said) == (1, True)


# --- the command ----------------------------------------------------------------------------------------------------


def test_a_command_has_a_session_an_environment_and_files_of_its_own(host: Host, tmp_path: Path) -> None:
    text = (
        "import json, os; print(json.dumps([os.getsid(0) == os.getpid(), os.read(0, 9) == b'', "
        "sorted(os.listdir('/proc/self/fd'), key=int)[:-1], "
        "{k: v for k, v in os.environ.items() if k.startswith('HANDOFF')}, os.getcwd()]))"
    )
    _, answer = host.exec(sys.executable, "-c", text, token=9)
    variables = {"HANDOFF_OPERATION": "one", "HANDOFF_TOKEN": "9", "HANDOFF_HOST_STATE": str(host.root)}
    assert json.loads(answer["output"]) == [True, True, ["0", "1", "2"], variables, os.getcwd()]


def test_a_command_that_cannot_be_executed_ends_as_in_a_shell(host: Host, tmp_path: Path) -> None:
    code, answer = host.exec("/nowhere")
    assert (code, answer["exit_code"], answer["output"]) == (1, 127, "/nowhere: No such file or directory\n")
    code, answer = host.exec(str(tmp_path), operation="two")
    assert (answer["exit_code"], answer["output"]) == (126, f"{tmp_path}: Permission denied\n")


def test_of_much_output_the_last_64_kib_are_kept_and_nothing_else(host: Host) -> None:
    _, answer = host.exec("sh", "-c", "yes | head -c 50000000; printf last")
    assert answer["output"].startswith(f"[{50000004 - 65536} bytes before this are left out]\n")
    assert answer["output"].endswith("y\nlast")
    assert len(answer["output"].partition("]\n")[2]) == 65536
    assert sum(path.stat().st_size for path in host.root.rglob("*") if path.is_file()) < 200_000


def test_what_a_command_leaves_behind_is_not_waited_for(host: Host, tmp_path: Path) -> None:
    code, answer = host.exec("sh", "-c", f"cat {host.gate} & echo $!")
    assert (code, answer["state"]) == (0, "done")
    kill(int(answer["output"]))  # it was left alone


def test_a_command_that_was_killed_tells_by_which_signal(host: Host) -> None:
    assert host.exec("sh", "-c", "kill -9 $$")[1]["exit_code"] == 137


# --- its end from outside -------------------------------------------------------------------------------------------


def test_stop_ends_the_command_and_what_it_started(host: Host) -> None:
    command = f"trap 'echo stopping; exit 5' TERM; sleep 1000 & echo run >> {host.runs}; wait"
    asking = host.begin(*words_of("one", 1), "--", "sh", "-c", command)
    wait_until(host.runs.exists, "the command runs")
    family = psutil.Process(host.started().command.pid).children(recursive=True)
    assert len(family) == 1
    code, answer = host.call("stop", *words_of("one", 1)[1:])
    assert (code, answer["state"], answer["exit_code"], answer["output"]) == (1, "done", 5, "stopping\n")
    assert ended(asking) == (code, answer)
    assert psutil.wait_procs(family, SECONDS)[1] == []


def test_a_command_that_does_not_listen_is_killed_after_a_grace(host: Host) -> None:
    program = "import lb.host.supervisor as found; found.GRACE_SECONDS = 0.1; from lb.host.cli import main; main()"
    command = f"trap '' TERM; echo run >> {host.runs}; while :; do read word < {host.gate}; done"
    asking = host.begin(*words_of("one", 1), "--", "sh", "-c", command, program=program)
    wait_until(host.runs.exists, "the command runs")
    assert host.call("stop", *words_of("one", 1)[1:])[1]["exit_code"] == 137
    assert ended(asking)[1]["exit_code"] == 137


def test_what_was_never_asked_for_cannot_be_stopped(host: Host) -> None:
    code, said = host.call("stop", *words_of("one", 1)[1:])
    assert (code, said) == (9, "handoff: error: operation one: has not been started; ask for it, or again\n")


# --- what is documented ---------------------------------------------------------------------------------------------


def test_the_options_of_exec_are_documented_and_no_other() -> None:
    text = (ROOT / "docs" / "rollouts.md").read_text().partition("\n## What runs on a host\n")[2].partition("\n## ")[0]
    documented = {code_of(row[0])[0].split()[0] for row in rows(text) if row[0].startswith("`--")}
    assert documented == {name for param in main.commands["exec"].params for name in param.opts if name[0] == "-"}


# --- the state ------------------------------------------------------------------------------------------------------


def test_all_of_the_state_is_the_users_alone(host: Host) -> None:
    assert host.exec("true")[0] == 0
    modes = {path: path.stat().st_mode & 0o777 for path in [host.root, *host.root.rglob("*")]}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if not path.is_dir()} == {0o600}
    assert len(modes) > 5


@pytest.mark.parametrize(
    ("environ", "uid", "root"),
    [
        ({"HANDOFF_HOST_STATE": "/somewhere", "XDG_STATE_HOME": "/x"}, 0, "/somewhere"),
        ({"XDG_STATE_HOME": "/x", "HOME": "/h"}, 0, "/var/lib/handoff/host"),
        ({"XDG_STATE_HOME": "/x", "HOME": "/h"}, 7, "/x/handoff/host"),
        ({"XDG_STATE_HOME": "x", "HOME": "/h"}, 7, "/h/.local/state/handoff/host"),
    ],
)
def test_where_the_state_lies(environ: dict[str, str], uid: int, root: str) -> None:
    assert state_root(environ, uid) == Path(root)


def test_a_state_that_is_not_ours_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="HANDOFF_HOST_STATE=here: is no absolute path"):
        state_root({"HANDOFF_HOST_STATE": "here"}, 7)
    with pytest.raises(HandoffError, match=r"neither \$HANDOFF_HOST_STATE nor \$XDG_STATE_HOME nor \$HOME is set"):
        state_root({}, 7)
    environ = {"HANDOFF_HOST_STATE": str(tmp_path)}
    with pytest.raises(HandoffError, match="belongs to uid"):
        prepared_root(environ, os.geteuid() + 1)
    tmp_path.chmod(0o750)
    with pytest.raises(HandoffError, match="others can look into it; chmod it to 0700"):
        prepared_root(environ, os.geteuid())
    (tmp_path / "file").touch()
    with pytest.raises(HandoffError, match="is not a directory"):
        prepared_root({"HANDOFF_HOST_STATE": str(tmp_path / "file")}, os.geteuid())


@pytest.mark.parametrize("text", ["", ".", "..", "/etc", "-x", "a b", "a\n", "é", "a" * 129, "a\0"])
def test_what_is_no_operation_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="is none; use up to 128"):
        ServiceState(tmp_path, "shop").operation(text)


def test_forget_keeps_the_newest_and_what_is_not_over(host: Host) -> None:
    asking = host.begin_waiting(operation="running")
    state = ServiceState(host.root, "shop")
    for number in range(4):
        operation = state.operation(f"r{number}/stage")
        os.close(operation.begin(Request("digest", 1, 1000.0 + number), 0))
        operation.keep_result(Result(0, b"", 0, 0.0))
    assert [one.id for one in state.operations()] == ["running", "r3/stage", "r2/stage", "r1/stage", "r0/stage"]
    program = "from lb.host.cli import main; main()"
    words = ["forget", "--service", "shop", "--older-than", "1h", "--keep"]
    assert host.begin(*words, "3", program=program).communicate(timeout=SECONDS)[0] == (
        "shop: forgot 2 operations, kept 3\n"
    )
    (state.path / "operations" / ".left").mkdir()
    assert host.begin(*words, "0", program=program).communicate(timeout=SECONDS)[0] == (
        "shop: forgot 2 operations, kept 1\n"
    )
    assert os.listdir(state.path / "operations") == ["running"]
    host.end()
    assert ended(asking)[0] == 0
