"""What docs/balancer.md says is what the code does: keys, defaults, commands, options."""

from __future__ import annotations

from typing import Any

import click
import msgspec
import pytest

from handoff.cli.run import run as run_service
from handoff.durations import format_duration
from lb import config
from lb.cli import main
from lb.cli.run import _OTHER_DEFAULTS, prepare
from lb.core.model import Backend, Balancer, Check, Ejection, HelloRoute, Service, Timeouts
from lb.describe import DRAIN_TIMEOUT, MAXIMUM_GENERATIONS
from lb.relay.access_log import _SIDES
from lb.relay.attempt import Phase
from lb.route_rules import ROUTE
from lb.source import Source, load
from tests.unit.test_docs import FENCE, ROOT, code_of, parsed, rows

DOCUMENT = ROOT / "docs" / "balancer.md"
COMMON = {"--name", "--run-dir", "--why", "--help"}
"""Said once, for all commands."""
TABLES: list[tuple[str, dict[str, tuple[str, config.Read]], type[msgspec.Struct], set[str]]] = [
    ("`[balancer]`", config._BALANCER, Balancer, set()),
    ("`[[service]]`", config._SERVICE, Service, {"active"}),
    ("`backends`", config._BACKEND, Backend, {"name"}),
    ("`[[service.route]]`", ROUTE, HelloRoute, set()),
    ("`[service.timeouts]`", config._TIMEOUTS, Timeouts, set()),
    ("`[service.check]`", config._CHECK, Check, set()),
    ("`[service.agent]`", config._AGENT, Check, {"type"}),
    ("`[service.ejection]`", config._EJECTION, Ejection, set()),
]
"""Heading; keys; the fields' defaults; keys whose default is told in words."""


def section(heading: str) -> list[list[str]]:
    """The rows of the table under a heading, without its own."""
    text = DOCUMENT.read_text()
    assert f"\n### {heading}\n" in text, heading
    found = rows(text.partition(f"\n### {heading}\n")[2].partition("\n#")[0])
    return [row for row in found if row[0] not in ("key", "option")]


def shown(value: object) -> str:
    match value:
        case None | () | msgspec.NODEFAULT:
            return "–"
        case True | False:
            return "on" if value else "off"
        case float():
            return f"`{format_duration(value)}`"
        case tuple():
            return f"`{list(value)}`"
        case _:
            return f"`{value}`"


@pytest.mark.parametrize(("heading", "keys", "kind", "told"), TABLES, ids=[table[0] for table in TABLES])
def test_every_key_of_the_file_is_documented_with_its_default_and_no_other(
    heading: str, keys: dict[str, tuple[str, config.Read]], kind: type[msgspec.Struct], told: set[str]
) -> None:
    documented = {code_of(row[0])[0]: row[1] for row in section(heading)}
    assert list(documented) == [key for key in documented if key in keys]
    assert set(documented) == set(keys)
    defaults = {field.name: field.default for field in msgspec.structs.fields(kind)}
    if kind is Balancer:
        defaults["name"] = "lb"
    expected = {key: shown(defaults[field]) for key, (field, _) in keys.items() if key not in told}
    assert {key: default for key, default in documented.items() if key not in told} == expected


def test_every_table_of_a_service_is_documented() -> None:
    text = DOCUMENT.read_text()
    assert [name for name in config._TABLES_OF_SERVICE if f"[service.{name}" not in text] == []


def test_every_command_is_documented_with_its_options_and_no_other() -> None:
    found = {}
    for row in rows(DOCUMENT.read_text().partition("\n## Commands\n")[2].partition("\n### ")[0]):
        if code_of(row[0]):
            found[code_of(row[0])[0].split()[0]] = set(code_of(row[1]))
    assert set(found) == set(main.commands)
    for name, command in main.commands.items():
        if name != "run":
            assert found[name] == options(command) - COMMON, name


def options(command: click.Command) -> set[str]:
    return {name for param in command.params for name in param.opts if name.startswith("--")}


def test_every_option_of_run_is_documented_and_no_other() -> None:
    documented = {word.split()[0] for row in section("Options of `run`") for word in code_of(row[0])}
    assert documented == options(main.commands["run"]) | {"FILE"}


def test_the_defaults_that_are_not_those_of_handoff_run_are_documented() -> None:
    documented: dict[str, Any] = {code_of(row[0])[0]: row[1] for row in section("Options of `run`")}
    assert documented["--drain-timeout"] == f"`{DRAIN_TIMEOUT}`"
    assert documented["--max-generations"] == f"`{MAXIMUM_GENERATIONS}`"
    assert {param.name for param in run_service.params} >= set(_OTHER_DEFAULTS)


def test_the_end_codes_of_the_access_log_are_documented() -> None:
    text = DOCUMENT.read_text().partition("\n## Access log\n")[2].partition("\n## ")[0]
    letters = {*_SIDES.values(), "-", "c", "s", *(phase.value for phase in Phase), "D"}
    assert {letter for letter in code_of(text) if len(letter) == 1} == letters


EXAMPLE = ROOT / "examples" / "balancer"


def test_the_example_is_a_good_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE)
    balancer = prepare(Source(file="lb.toml")).balancer
    assert {name: len(pool) for name, pool in balancer.services[0].pools.items()} == {"blue": 1, "green": 1}


def test_the_commands_of_the_example_are_taken() -> None:
    text = (EXAMPLE / "README.md").read_text()
    lines = [line for language, block in FENCE.findall(text) for line in block.splitlines() if language == "sh"]
    taken = [parsed(line) for line in lines if line.startswith("handoff ")]
    assert len(taken) > 5
    # The ports that it tells of are those of the file.
    binds = {address for context in taken for address in context.params.get("bind") or ()}
    pools = load(Source(file=str(EXAMPLE / "lb.toml"))).services[0].pools
    assert binds == {one.address for pool in pools.values() for one in pool}


def test_the_file_in_the_document_is_good() -> None:
    text, routed, shared = [block for language, block in FENCE.findall(DOCUMENT.read_text()) if language == "toml"]
    assert config.parse_config(text, "docs/balancer.md").name == "edge"
    assert len(config.parse_config(routed, "docs/balancer.md").services[0].routes) == 1
    shared += 'listen = "127.0.0.1:8080"\npool.main.backends = ["app.internal:8000"]\n'
    check = config.parse_config(shared, "docs/balancer.md").services[0].check
    assert check is not None
    assert check.path == "/health"
