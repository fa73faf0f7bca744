"""House rules that no linter knows."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRODUCT = sorted(path for folder in ("handoff", "lb", "bench") for path in (ROOT / folder).rglob("*.py"))
PROCESS_MANAGER = [path for path in PRODUCT if path.is_relative_to(ROOT / "handoff")]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAXIMUM_FUNCTION_LINES = 60
MAXIMUM_FILE_LINES = 560
LONGER = {"handoff/core/supervisor.py": 640}
"""The one decision table that is worth reading in one piece."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(), str(path))))


def called(node: ast.AST) -> str:
    """The dotted name of what is called; empty for anything else."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_functions_fit_on_a_screen_and_files_on_a_few(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= LONGER.get(name_of(path), MAXIMUM_FILE_LINES), f"{name_of(path)} has {lines} lines"
    for node in nodes(path):
        if isinstance(node, Function):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            assert size <= MAXIMUM_FUNCTION_LINES, f"{name_of(path)}:{node.lineno}: {node.name} has {size} lines"


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_no_error_is_swallowed_and_nothing_is_unpickled(path: Path) -> None:
    for node in nodes(path):
        where = f"{name_of(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler):
            wide = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            silent = all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body)
            assert not (wide and silent), f"{where}: swallows everything"
        if called(node) in ("contextlib.suppress", "suppress"):
            assert isinstance(node, ast.Call)
            names = {ast.unparse(argument) for argument in node.args}
            assert not names & {"Exception", "BaseException"}, f"{where}: swallows everything"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & {"pickle", "marshal", "shelve"}, f"{where}: what a peer sends must stay data"


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_tests_do_not_sleep(path: Path) -> None:
    """Application texts may: they are strings here. `asyncio.sleep(0)` is a turn of the loop."""
    for node in nodes(path):
        name = called(node)
        if name in ("time.sleep", "sleep", "asyncio.sleep"):
            assert isinstance(node, ast.Call)
            is_turn = name == "asyncio.sleep" and [ast.unparse(argument) for argument in node.args] == ["0"]
            assert is_turn, f"{name_of(path)}:{getattr(node, 'lineno', 0)}: wait for what is to happen instead"


@pytest.mark.parametrize("path", [*TESTS, *PRODUCT], ids=name_of)
def test_no_process_is_ended_by_its_name(path: Path) -> None:
    words = re.compile(r"\b(p" + r"kill|kill" + r"all)\b")
    assert not words.search(path.read_text())


@pytest.mark.parametrize("path", PROCESS_MANAGER, ids=name_of)
def test_what_hurts_others_is_not_called(path: Path) -> None:
    """Other people's children are not waited for; a listener, which all processes share, is never shut down; a drain
    has its own deadline (since Python 3.12 `wait_closed` waits for every connection); the parent's death is an EOF."""
    for node in nodes(path):
        name = called(node)
        where = f"{name_of(path)}:{getattr(node, 'lineno', 0)}: {name}"
        assert name not in ("os.wait", "os.wait3", "os.wait4"), where
        assert not name.endswith(".wait_closed"), where
        if isinstance(node, ast.Call) and node.args:
            first = ast.unparse(node.args[0])
            assert not (name == "os.waitpid" and first in ("-1", "0")), where
            assert not (name.endswith(".shutdown") and "SHUT_" in first), where
    assert "PDEATHSIG" not in path.read_text().upper()


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_every_skip_has_a_reason(path: Path) -> None:
    for node in nodes(path):
        where = f"{name_of(path)}:{getattr(node, 'lineno', 0)}"
        if called(node) in ("pytest.mark.skipif", "pytest.mark.xfail"):
            assert isinstance(node, ast.Call)
            assert any(keyword.arg == "reason" for keyword in node.keywords), f"{where}: no reason"
        if called(node) in ("pytest.skip", "pytest.mark.skip", "pytest.xfail"):
            assert isinstance(node, ast.Call)
            assert node.args or node.keywords, f"{where}: no reason"
        if isinstance(node, Function | ast.ClassDef):
            bare = {ast.unparse(one) for one in node.decorator_list} & {"pytest.mark.skip", "pytest.mark.xfail"}
            assert not bare, f"{where}: no reason"
