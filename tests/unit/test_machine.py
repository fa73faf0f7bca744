"""The one rule of every state machine."""

from __future__ import annotations

import enum

import pytest

from handoff.core.machine import IllegalTransition, follow


class Door(enum.Enum):
    OPEN = "open"
    SHUT = "shut"


class Push(enum.Enum):
    PUSH = "push"
    PULL = "pull"


TABLE = {(Door.SHUT, Push.PUSH): Door.OPEN}


def test_a_pair_of_the_table_gives_its_state() -> None:
    assert follow(TABLE, Door.SHUT, Push.PUSH) is Door.OPEN


def test_a_pair_that_the_table_does_not_have_names_state_and_event() -> None:
    with pytest.raises(IllegalTransition, match=r"^Door OPEN: PULL is not possible here$") as caught:
        follow(TABLE, Door.OPEN, Push.PULL)
    assert (caught.value.state, caught.value.event) == (Door.OPEN, Push.PULL)
    assert caught.value.__cause__ is None


def test_an_illegal_pair_does_not_change_the_table() -> None:
    with pytest.raises(IllegalTransition):
        follow(TABLE, Door.SHUT, Push.PULL)
    assert TABLE == {(Door.SHUT, Push.PUSH): Door.OPEN}
