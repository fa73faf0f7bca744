"""Sub-commands of other distributions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from handoff.cli.commands import handoff, run_command

MODULE = """
import click

@click.group()
def lb():
    "Balance."

@lb.command()
def status():
    click.echo("balanced")

text = "no command"
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A distribution `plugin-test` on the path, with three plug-ins."""
    (tmp_path / "plugin_test_module.py").write_text(MODULE)
    info = tmp_path / "plugin_test-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-test\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(
        "[handoff.commands]\nbalance = plugin_test_module:lb\nmissing = plugin_test_gone:lb\n"
        "text = plugin_test_module:text\nreload = plugin_test_module:lb\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("plugin_test_module", None)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["handoff", *arguments])
    return run_command()


def test_a_plug_in_is_a_command_of_ours(
    site: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "balance", "status") == 0
    assert capfd.readouterr().out == "balanced\n"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "ModuleNotFoundError: No module named 'plugin_test_gone'"),
        ("text", "plugin_test_module:text is a str and no click command"),
    ],
)
def test_a_broken_plug_in_says_why_in_one_line(
    site: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str, reason: str
) -> None:
    assert call(monkeypatch, name, "status", "--json") == 1
    said = capfd.readouterr().err
    expected = f"{name}: the plug-in of plugin-test 1.2 cannot be loaded ({reason}); reinstall or remove plugin-test"
    assert said == f"handoff: error: {expected}\n"


def test_help_lists_plug_ins_and_survives_broken_ones(
    site: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--help") == 0
    said = capfd.readouterr().out
    assert "Balance." in said
    assert "cannot be loaded" in said


def test_a_plug_in_does_not_take_the_place_of_our_own_command(site: Path) -> None:
    found = handoff.get_command(click.Context(handoff), "reload")
    assert found is not None
    assert found.callback is not None
    assert found.callback.__module__ == "handoff.cli.operate"
