"""Versions, and how they get into a command line."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handoff.errors import UsageError
from lb.core.version_label import filled, is_version


@pytest.mark.parametrize("text", ["1", "v1.2.3", "2024-06-01_12", "1.0+build.5", "a" * 128, "0f3c9b1"])
def test_what_can_be_a_version(text: str) -> None:
    assert is_version(text)


@pytest.mark.parametrize(
    "text", ["", "-rf", ".", "..", ".hidden", "+1", "_1", "a b", "a/b", "a;b", "$x", "é", "١", "a\n", "a" * 129, "a\0"]
)
def test_what_cannot_be_a_version(text: str) -> None:
    assert not is_version(text)
    with pytest.raises(UsageError, match="is none; use up to 128 letters, digits and"):
        filled("stage {version}", text)


def test_each_placeholder_becomes_the_version() -> None:
    assert filled("stage {version} --to=releases/{version}", "1.2") == "stage 1.2 --to=releases/1.2"


@pytest.mark.parametrize(
    "template",
    ["echo ${HOME}", "awk '{print $1}' {a,b}", "docker inspect -f '{{json}}'", "find . -exec x {} +", "{ ls; }"],
)
def test_what_is_the_shells_stays(template: str) -> None:
    assert filled(template, "1") == template


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("stage {label}", r"\{label\} is unknown; only \{version\} is filled in"),
        ("stage {VERSION}", r"\{VERSION\} is unknown"),
        ("stage ${version}", r"\$\{version\} is not the version; write \{version\}"),
        ("stage {{version}}", r"is not the version; write \{version\}"),
        ("stage \0", "has a NUL"),
    ],
)
def test_what_would_not_be_meant_is_refused(template: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        filled(template, "1")


@settings(max_examples=30)
@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}", fullmatch=True))
def test_a_version_is_one_word_of_a_shell_however_the_template_quotes_it(version: str) -> None:
    for template in ("{version}", "'{version}'", '"{version}"'):
        assert shlex.split(filled(template, version)) == [version]
