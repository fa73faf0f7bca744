"""What the documents say is what the code does: options, keys, defaults, commands, tables, links."""

from __future__ import annotations

import enum
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import click
import pytest

from handoff.addresses import DEFAULT_UNIX_MODE
from handoff.cli.commands import handoff
from handoff.cli.run import run
from handoff.config import OPTIONS
from handoff.core.generation import GENERATION_TABLE
from handoff.core.worker import WORKER_TABLE
from handoff.durations import format_duration
from handoff.errors import ExitCode
from handoff.inherited import DEFAULT_BIND
from handoff.master.master import _SIGNAL_EVENTS
from handoff.option_table import ONLY_ON_COMMAND_LINE
from handoff.settings import Settings
from handoff.worker.http import LINGER_SECONDS
from lb.cli import main as balancer
from lb.host.cli import main as host
from lb.rollout.cli import main as deploy

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
CONFIGURATION = ROOT / "docs" / "configuration.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
DOCUMENTS = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")), *DECISIONS]

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows, without headings."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def option_rows() -> list[list[str]]:
    section = CONFIGURATION.read_text().partition("## Options of")[2].partition("## The environment")[0]
    return [row for row in rows(section) if row[0] != "option"]


def code_of(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


# --- options and keys -----------------------------------------------------------------------------------------------


def documented_options() -> set[str]:
    return {word.split()[0] for row in option_rows() for word in code_of(row[0])}


def test_every_option_of_run_is_documented_and_no_other() -> None:
    options = {name for param in run.params for name in (*param.opts, *param.secondary_opts)}
    assert documented_options() == {name.upper() if name == "app" else name for name in options} | {"--"}


def test_every_key_of_the_file_is_documented_and_no_other() -> None:
    assert {key for row in option_rows() for key in code_of(row[1])} == set(OPTIONS)


def test_option_and_key_of_a_row_belong_together() -> None:
    for row in option_rows():
        options, keys = code_of(row[0]), code_of(row[1])
        if keys == ["command"]:  # it stands behind `--`
            continue
        if options and keys:
            assert options[0].split()[0].lstrip("-").lower().replace("-", "_") == keys[0]
        elif options:
            assert options[0].split()[0].removeprefix("--") in ONLY_ON_COMMAND_LINE


def shown(value: object, field: str) -> str:
    """A default as the table shows it."""
    match value:
        case None:
            return "`all`" if field == "surge" else "–"
        case True | False:
            return "on" if value else "off"
        case float():
            return f"`{format_duration(value)}`"
        case "":
            return "empty"
        case () | {}:
            return f"`{DEFAULT_BIND}`" if field == "binds" else "–"
        case _:
            return f"`{value}`"


def test_the_defaults_are_those_of_the_settings() -> None:
    defaults = Settings(app="main:app", name="web")
    checked = 0
    for row in option_rows():
        for key in code_of(row[1]):
            field = OPTIONS[key].field
            if field in Settings.__struct_fields__ and key not in ("app", "name"):
                assert (key, row[2]) == (key, shown(getattr(defaults, field), field))
                checked += 1
    assert checked == len(Settings.__struct_fields__) - 2


def test_the_mode_of_unix_sockets_is_the_documented_one() -> None:
    assert f"A unix socket has mode {DEFAULT_UNIX_MODE:04o}" in CONFIGURATION.read_text()


# --- commands -------------------------------------------------------------------------------------------------------


def command_lines() -> list[tuple[str, str]]:
    """Every line in a shell block that runs handoff: (document, line)."""
    found = []
    for document in DOCUMENTS:
        for language, block in FENCE.findall(document.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                command = re.sub(r"^(?:\S*\w=\S* )*(?:ExecStart=|ExecReload=)?(?:\S*/)?(?=handoff )", "", line.strip())
                if language == "sh" and command.startswith("handoff "):
                    found.append((document.name, command))
    return found


def test_there_are_commands_to_check() -> None:
    assert len(command_lines()) > 10


@pytest.mark.parametrize(("document", "line"), command_lines())
def test_the_command_line_takes_what_the_documents_say(document: str, line: str) -> None:
    assert parsed(line).info_name in (*handoff.own, *balancer.commands, *host.commands, *deploy.commands)


def parsed(line: str) -> click.Context:
    """What click makes of a line `handoff …`. Raises ClickException."""
    _, name, *arguments = shlex.split(line, comments=True)
    commands = {one: handoff.get_command(click.Context(handoff), one) for one in handoff.own}
    if name in ("lb", "host"):
        commands = (balancer if name == "lb" else host).commands
        name, *arguments = arguments
    if name == "deploy":
        commands = deploy.commands
        name, *arguments = arguments if arguments[0] in commands else ["start", *arguments]
    with click.Context(handoff) as parent:
        return commands[name].make_context(name, arguments, parent=parent)


def test_the_readme_names_every_command() -> None:
    named = {line.split()[1] for document, line in command_lines() if document == README.name}
    assert named == {*handoff.own, "lb", "deploy"}


def test_make_knows_the_targets_that_the_documents_name() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        named = set(re.findall(r"(?:`|^)make (\w+)", document.read_text(), re.MULTILINE))
        assert named <= targets, document.name
    assert {"run", "test", "check", "bench"} <= set(re.findall(r"make (\w+)", README.read_text()))


def test_the_readme_has_two_commands_of_set_up() -> None:
    quick_start = README.read_text().partition("## Quick start")[2].partition("\n## ")[0]
    first = FENCE.findall(quick_start)[0][1]
    assert [line.partition("#")[0].strip() for line in first.splitlines()] == ["make run", "make test"]


# --- tables ---------------------------------------------------------------------------------------------------------


def render(table: Mapping[tuple[enum.Enum, enum.Enum], enum.Enum]) -> str:
    """States down, events across; a cell is the next state, or empty where the event is not possible."""
    states, events = list(type(next(iter(table))[0])), list(type(next(iter(table))[1]))
    lines = ["| | " + " | ".join(event.value for event in events) + " |", "|---" * (len(events) + 1) + "|"]
    for state in states:
        cells = [table[state, event].value if (state, event) in table else "" for event in events]
        lines.append("| **" + state.value + "** | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@pytest.mark.parametrize("table", [GENERATION_TABLE, WORKER_TABLE], ids=["generation", "worker"])
def test_the_architecture_shows_the_table_of_the_code(
    table: Mapping[tuple[enum.Enum, enum.Enum], enum.Enum],
) -> None:
    assert render(table) in ARCHITECTURE.read_text()


def test_the_readme_lists_every_exit_code() -> None:
    section = README.read_text().partition("## Verdicts and exit codes")[2].partition("\n## ")[0]
    assert {row[0] for row in rows(section)} - {"code"} == {str(int(code)) for code in ExitCode}


def test_the_readme_lists_every_signal() -> None:
    section = README.read_text().partition("## Signals")[2].partition("\n## ")[0]
    named = {name for row in rows(section) for name in code_of(row[0])}
    assert named == {number.name.removeprefix("SIG") for number in _SIGNAL_EVENTS}


def test_the_readme_says_how_long_idle_connections_linger() -> None:
    assert f"after a linger of {LINGER_SECONDS:g} s" in README.read_text()


# --- files ----------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """What GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_links_of_a_document_lead_somewhere(document: Path) -> None:
    for link in _LINK.findall(document.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_the_files_that_the_architecture_maps_exist_and_none_is_missing() -> None:
    section = ARCHITECTURE.read_text().partition("## Files")[2]
    named = {name for row in rows(section) for name in code_of(row[0])} - {"file"}
    packages = {"handoff", "handoff/core", "handoff/master", "handoff/worker", "handoff/cli"}
    existing = {
        str(path.relative_to(ROOT))
        for package in packages
        for path in (ROOT / package).glob("*.py")
        if path.name not in ("__init__.py", "__main__.py", "version.py")
    }
    assert named == existing


def test_decisions_are_numbered_without_a_gap_and_have_the_three_parts() -> None:
    assert [int(path.name[:4]) for path in DECISIONS] == list(range(1, len(DECISIONS) + 1))
    for path in DECISIONS:
        text = path.read_text()
        assert text.startswith(f"# {path.name[:4]}: ")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]


# --- edge cases -----------------------------------------------------------------------------------------------------


def test_every_edge_case_of_the_balancer_names_tests_that_are_there() -> None:
    listed = [row for row in rows((ROOT / "docs" / "balancer-edge-cases.md").read_text()) if row[0].isdigit()]
    assert [int(row[0]) for row in listed] == list(range(1, 26))
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)\(", path.read_text(), re.MULTILINE)
    }
    for number, _, _, tests in listed:
        named = code_of(tests)
        assert named, number
        assert not set(named) - there, number
