"""A client of the control socket whose service does not answer."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from handoff.cli.client import ask
from handoff.core.control import Status
from handoff.errors import ExitCode, HandoffError
from handoff.run_directory import RunDirectory


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunDirectory]:
    found = RunDirectory(tmp_path, "web")
    found.lock()
    yield found
    os.unlink(found.control_socket_path)
    found.close()


@pytest.mark.parametrize("is_full", [False, True])
def test_a_service_that_does_not_answer_is_waited_for_no_longer_than_asked(
    service: RunDirectory, is_full: bool
) -> None:
    """A master that stands still accepts nobody, and then its queue is full: connect(2) would wait without end."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(service.control_socket_path)
        listener.listen(1)
        while is_full:
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            try:
                waiting.connect(service.control_socket_path)
            except BlockingIOError:
                break
        with pytest.raises(HandoffError) as caught:
            ask(service, Status(), 0.1)
        assert caught.value.exit_code is ExitCode.TIMED_OUT
        assert caught.value.message == "service web: no answer within 0.1 s; it goes on; ask handoff status"
