"""One rule for every state machine here: a pair that is not in the table changes nothing and raises."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TypeVar

S = TypeVar("S", bound=enum.Enum)
E = TypeVar("E", bound=enum.Enum)


class IllegalTransition(Exception):
    """An event came that its state has no row for; the message names both."""

    def __init__(self, state: enum.Enum, event: enum.Enum) -> None:
        super().__init__(f"{type(state).__name__} {state.name}: {event.name} is not possible here")
        self.state = state
        self.event = event


def follow(table: Mapping[tuple[S, E], S], state: S, event: E) -> S:
    """The state after `event`. Raises IllegalTransition for a pair that the table does not have."""
    try:
        return table[state, event]
    except KeyError:
        raise IllegalTransition(state, event) from None
