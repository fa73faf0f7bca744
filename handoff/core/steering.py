"""Which slots get new connections, and who accepts from the sockets of the others. No I/O."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

# Classic BPF: linux/bpf_common.h, linux/filter.h.
_LOAD_ABSOLUTE = 0x20  # BPF_LD | BPF_W | BPF_ABS
_MODULO = 0x94  # BPF_ALU | BPF_MOD | BPF_K
_JUMP_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_RANDOM = 0xFFFFF000 + 56  # SKF_AD_OFF + SKF_AD_RANDOM


class Instruction(NamedTuple):
    """One `struct sock_filter`."""

    code: int
    if_true: int
    if_false: int
    operand: int


def program(slots: Sequence[int]) -> list[Instruction]:
    """A program that returns one of the slots, each equally often, by a random number for each connection."""
    assert slots
    found = [Instruction(_LOAD_ABSOLUTE, 0, 0, _RANDOM), Instruction(_MODULO, 0, 0, len(slots))]
    for index, slot in enumerate(slots[:-1]):
        found += [Instruction(_JUMP_IF_EQUAL, 0, 1, index), Instruction(_RETURN, 0, 0, slot)]
    return [*found, Instruction(_RETURN, 0, 0, slots[-1])]


class Plan(NamedTuple):
    """`steered`: the slots that get new connections; `adopted`: by worker, the slots it accepts from beside its own."""

    steered: tuple[int, ...]
    adopted: Mapping[int, tuple[int, ...]]


def plan(serving: Mapping[int, int], slots: Collection[int]) -> Plan | None:
    """`serving`: the slot of each worker that accepts and does not hang; `slots`: all that have a socket.

    None where nobody serves: then nothing can be made better.
    """
    if not serving:
        return None
    steered = tuple(sorted(set(serving.values())))
    workers = sorted(serving)
    adopted: dict[int, list[int]] = {}
    for slot in sorted(set(slots) - set(steered)):
        adopted.setdefault(workers[slot % len(workers)], []).append(slot)
    return Plan(steered, {worker: tuple(some) for worker, some in adopted.items()})
