"""The access log: its reader may stand still, and others may write to the same output."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from typing import Any, cast

import pytest

from lb.relay.access_log import MAXIMUM_BYTES, AccessLog
from lb.relay.attempt import Attempt, Phase


class Ended:
    backend = None
    hello = None
    source = ("192.0.2.7", 1234)
    phase = Phase.QUEUE


ENDED = cast("Attempt", Ended())


class Shared:
    """An output that several logs write to, and one end that reads it."""

    def __init__(self, kind: str) -> None:
        if kind == "socket":
            ours, theirs = socket.socketpair()
            self.reader, self.writer = ours.detach(), theirs.detach()
        else:
            self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.logs = [AccessLog(self.writer) for _ in range(2)]
        self._text = b""

    def read(self) -> None:
        while True:
            try:
                part = os.read(self.reader, 1 << 16)
            except BlockingIOError:
                return
            self._text += part

    def lines(self) -> list[dict[str, Any]]:
        """All that was written and has room."""
        before = -1
        while before < len(self._text):
            before = len(self._text)
            for log in self.logs:
                log.flush()
            self.read()
        return [json.loads(line) for line in self._text.splitlines()]

    def close(self) -> None:
        for log in self.logs:
            log.close()
        os.close(self.reader)
        os.close(self.writer)


@pytest.fixture(params=["pipe", "socket"])
def shared(request: pytest.FixtureRequest) -> Iterator[Shared]:
    made = Shared(request.param)
    yield made
    made.close()


def test_a_reader_that_stands_still_holds_nobody_up_and_lines_beyond_a_limit_are_counted(shared: Shared) -> None:
    log, written = shared.logs[0], 0
    while not log.dropped:
        log.ended(ENDED, "shop", "server", f"reason {written}", is_late=False, seconds=0.0)
        written += 1
        assert written < MAXIMUM_BYTES  # of one byte each
        log.flush()
    found = [line["reason"] for line in shared.lines()]
    assert found == [f"reason {number}" for number in range(written - 1)]
    log.ended(ENDED, "shop", "server", "later", is_late=True, seconds=10.0)
    assert shared.lines()[-1]["reason"] == "later"
    assert (shared.lines()[-1]["end"], shared.lines()[-1]["seconds"]) == ("sQ", 10.0)


def test_lines_of_several_relay_workers_stay_whole(shared: Shared) -> None:
    for number in range(3000):
        for index, log in enumerate(shared.logs):
            log.ended(ENDED, f"service-{index}", "proxy", "x" * (number % 700), is_late=False, seconds=0.0)
            if number % (index + 2) == 0:
                log.flush()
        if number % 50 == 0:
            shared.read()
    found = shared.lines()
    assert len(found) == 6000
    assert {line["service"] for line in found} == {"service-0", "service-1"}


def test_a_reader_that_is_gone_is_none(shared: Shared) -> None:
    os.close(shared.reader)
    shared.logs[0].ended(ENDED, "shop", "server", "nobody reads this", is_late=False, seconds=0.0)
    shared.logs[0].flush()
    shared.reader = os.open("/dev/null", os.O_RDONLY)
