"""The program that chooses a slot, run by a small interpreter of classic BPF, and the plan of who accepts where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handoff.core.steering import Instruction, plan, program


def run(instructions: Sequence[Instruction], random: int) -> int:
    accumulator, at = 0, 0
    while True:
        code, if_true, if_false, operand = instructions[at]
        at += 1
        match code:
            case 0x20:
                accumulator = random
            case 0x94:
                accumulator %= operand
            case 0x15:
                at += if_true if accumulator == operand else if_false
            case 0x06:
                return operand
            case _:
                raise AssertionError(f"no such instruction: {code:#x}")


@given(st.lists(st.integers(0, 255), min_size=1, max_size=256, unique=True))
def test_each_slot_is_chosen_equally_often(slots: list[int]) -> None:
    instructions = program(slots)
    assert len(instructions) <= 4096
    assert Counter(run(instructions, random) for random in range(len(slots) * 3)) == dict.fromkeys(slots, 3)


@given(st.dictionaries(st.integers(1, 50), st.integers(0, 9)), st.integers(0, 10))
def test_every_slot_is_served_by_somebody(serving: dict[int, int], count: int) -> None:
    made = plan(serving, range(count))
    if not serving:
        assert made is None
        return
    assert made is not None
    assert made.steered == tuple(sorted(set(serving.values())))
    adopted = [slot for slots in made.adopted.values() for slot in slots]
    assert sorted(adopted) == sorted(set(range(count)) - set(serving.values()))
    assert set(made.adopted) <= set(serving)


@pytest.mark.parametrize(("workers", "shares"), [(1, [8]), (2, [4, 4]), (4, [2, 2, 2, 2])])
def test_orphaned_slots_are_shared_out(workers: int, shares: list[int]) -> None:
    made = plan({worker: worker + 100 for worker in range(workers)}, range(8))
    assert made is not None
    assert sorted(map(len, made.adopted.values())) == shares
