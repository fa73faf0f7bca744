"""deploy.toml: what it makes, and how what is wrong is told."""

from __future__ import annotations

import msgspec
import pytest

from handoff.errors import UsageError
from lb.core.rollout.model import Deploy, Gate, Host
from lb.rollout import config
from lb.rollout.cli import main
from lb.rollout.config import parse_deploy, with_strategy
from tests.unit.test_docs import ROOT, code_of, rows

WHOLE = """
[deploy]
service = "shop"
strategy = "rolling"
balancers = ["ssh://deploy@lb1", "ssh://deploy@lb2"]
store = "etcd://10.0.0.7:2379"
max_unavailable = 2
batch = "25%"
drain = true
bake = "10s"
on_failure = "stop"
stage = "/srv/shop/bin/stage {version}"
activate = "ln -sfn releases/{version} /srv/shop/.next && mv -T /srv/shop/.next /srv/shop/current"
reload = "handoff reload --wait --name shop --label {version} --port {port}"
[gate]
reset_percent = 0.5
[[host]]
name = "web1"
ssh = "deploy@web1"
server = "shop/b1"
variables = { port = "8001" }
[[host]]
name = "jobs"
variables = { port = "0" }
"""
LEAST = '[deploy]\nservice = "shop"\nreload = "r"\n'


def test_the_whole_file() -> None:
    deploy = parse_deploy(WHOLE, "deploy.toml")
    assert deploy.hosts == (
        Host(name="web1", ssh="deploy@web1", server="shop/b1", variables={"port": "8001"}),
        Host(name="jobs", variables={"port": "0"}),
    )
    assert deploy.gate == Gate(reset_percent=0.5)
    assert (deploy.service, deploy.strategy, deploy.drain, deploy.on_failure) == ("shop", "rolling", True, "stop")
    assert deploy.batch_size(20) == 2, "25 % of 20 are 5, and the budget is 2"
    assert deploy.batch_size(4) == 1


def test_what_is_left_out_has_its_default() -> None:
    deploy = parse_deploy(LEAST + '[[host]]\nname = "a"\n', "deploy.toml")
    assert (deploy.strategy, deploy.store, deploy.batch, deploy.max_unavailable) == ("rolling", "balancer", "1", 1)
    assert (deploy.drain, deploy.bake_seconds, deploy.on_failure) == (False, 10.0, "rollback")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[deploy", "deploy.toml: expected ']' at the end of a table declaration (at end of document)"),
        ('[[host]]\nname = "a"', "service is missing"),
        ('[deploy]\nservice = "shop"\n[[host]]\nname = "a"', "stage, activate, reload: expected at least one of them"),
        (LEAST, "deploy.toml: host: expected tables [[host]], 1 to 1000"),
        (
            LEAST + '[[host]]\nname = "a"\n[[host]]\nname = "a"',
            "line 7: a is there twice; give each a name of its own",
        ),
        (
            LEAST + 'batchs = 1\n[[host]]\nname = "a"',
            'line 4: "batchs" is no key that is known here; did you mean "batch"?',
        ),
        (LEAST + 'batch = "0%"\n[[host]]\nname = "a"', "expected a number of hosts, or a percentage such as"),
        (LEAST + 'batch = 3\n[[host]]\nname = "a"', "line 4: batch: 3 at once are more than max_unavailable = 1"),
        (LEAST + 'drain = true\n[[host]]\nname = "a"', "needs a balancer that hosts are taken out of; set balancers"),
        (LEAST + 'steps = [50, 10]\n[[host]]\nname = "a"', "expected ascending percentages"),
        (LEAST + 'steps = [10, 100]\n[[host]]\nname = "a"', "expected a whole number from 1 to 99"),
        (LEAST + 'bake = "fast"\n[[host]]\nname = "a"', "line 4: bake"),
        (LEAST + 'strategy = "big bang"\n[[host]]\nname = "a"', 'expected "rolling" or "blue-green" or "canary"'),
        (LEAST + 'strategy = "canary"\n[[host]]\nname = "a"', "canary: needs a balancer that switches; set balancers"),
        (
            LEAST + 'stage = "s {vresion}"\n[[host]]\nname = "a"',
            "{vresion} is not known; known: {host}, {pool}, {version}",
        ),
        (LEAST + 'before = "b {host}"\n[[host]]\nname = "a"', "{host} is not known; known: {version}"),
        (LEAST + '[[host]]\nname = "a"\nserver = "blog/a"', "blog/a is of another service than shop"),
        (LEAST + '[[host]]\nname = "a"\nserver = "shop/x/y/z"', "expected SERVICE/SERVER or SERVICE/POOL/SERVER"),
        (LEAST + '[[host]]\nname = "a"\nssh = "-oProxyCommand=x"', "expected text that does not begin with -"),
        (LEAST + '[[host]]\nname = "a"\nvariables = { version = "1" }', "expected a name of small letters"),
        (LEAST + '[gate]\nprobe = "file:///etc/passwd"\n[[host]]\nname = "a"', "expected http://… or https://…"),
        (LEAST + 'balancers = ["lb1", "lb1"]\n[[host]]\nname = "a"', "expected each of them once"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_deploy(text, "deploy.toml")
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_a_strategy_of_the_command_line_must_fit_the_hosts() -> None:
    deploy = parse_deploy(WHOLE, "deploy.toml")
    assert with_strategy(deploy, None) is deploy
    with pytest.raises(UsageError, match="--strategy: web1 is in no pool; expected server = SERVICE/POOL/SERVER"):
        with_strategy(deploy, "blue-green")
    pools = WHOLE.replace('"shop/b1"', '"shop/blue/b1"').replace(
        'name = "jobs"', 'name = "jobs"\nserver = "shop/blue/j"'
    )
    with pytest.raises(UsageError, match="blue-green: needs hosts in two pools; there are: blue"):
        with_strategy(parse_deploy(pools, "deploy.toml"), "blue-green")
    changed = parse_deploy(pools.replace("shop/blue/j", "shop/green/j"), "deploy.toml")
    assert with_strategy(changed, "canary").strategy == "canary"


# --- what docs/rollouts.md says ---------------------------------------------------------------------------------------


def documented(heading: str) -> list[list[str]]:
    text = (ROOT / "docs" / "rollouts.md").read_text().partition(f"{heading}\n")[2].partition("\n#")[0]
    return [row for row in rows(text) if row[0] not in ("key", "command")]


@pytest.mark.parametrize(
    ("heading", "known"),
    [
        ("### `[deploy]`", set(config._DEPLOY)),
        ("### `[[host]]`", {*config._HOST, "variables"}),
        ("### `[gate]`", set(config._GATE)),
        ("## Commands", {*main.commands} - {"start"} | {"VERSION"}),
    ],
)
def test_every_key_and_command_is_documented(heading: str, known: set[str]) -> None:
    assert {code_of(row[0])[0].split()[0] for row in documented(heading)} == known


def test_every_option_of_a_command_is_documented() -> None:
    for row in documented("## Commands"):
        name = code_of(row[0])[0].split()[0]
        command = main.commands["start" if name == "VERSION" else name]
        options = {option for one in command.params for option in one.opts if option.startswith("--")}
        assert set(code_of(row[1])) == options - {"--file"}, name


def test_documented_defaults_are_those_of_the_code() -> None:
    fields = {one.name: one.default for one in msgspec.structs.fields(Deploy)}
    for key, (name, _) in config._DEPLOY.items():
        cell = next(row[1] for row in documented("### `[deploy]`") if code_of(row[0]) == [key])
        default = fields[name]
        match default:
            case bool():
                shown = str(default).lower()
            case float():
                shown = f'"{default:g}s"'
            case tuple():
                shown = str(list(default))
            case str() if key != "batch":
                shown = f'"{default}"'
            case _:
                shown = str(default)
        if cell not in ("none", "–"):
            assert cell == f"`{shown}`", key
        else:
            assert default in (None, (), msgspec.NODEFAULT), key
