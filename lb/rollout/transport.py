"""How a deployer reaches a host: this machine, or another one through the system's `ssh`.

What it runs there runs under `handoff host exec`: a session that breaks is made again, under the same id.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import shlex
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, NamedTuple, Protocol, TypeVar

import msgspec

from handoff.durations import MAX_DURATION_SECONDS, format_duration
from handoff.errors import ExitCode, HandoffError, UsageError
from lb.rollout.processes import Flooded, Ran, run

MAXIMUM_TRIES = 4
FIRST_DELAY_SECONDS = 0.25
"""Between two tries; doubled for each."""
ANSWER_SECONDS = 20.0
"""For the way there and back, beyond what the host itself is told to wait."""


T = TypeVar("T")


class Done(NamedTuple):
    exit_code: int
    output: str


class Unreachable(HandoffError):
    """The host cannot be reached, or does not answer: whether it has done what was asked is not known."""


REPEAT_SECONDS = (0.25, 0.5, 1.0)
"""Pauses between tries of what may be asked twice."""


async def repeatedly(ask: Callable[[], Awaitable[T]], pause: Callable[[float], Awaitable[None]] = asyncio.sleep) -> T:
    """For what may be done twice: one that cannot be reached for a moment, or whose answer is lost, is asked again."""
    for seconds in REPEAT_SECONDS:
        try:
            return await ask()
        except AccessDenied:
            raise
        except Unreachable:
            await pause(seconds)
    return await ask()


class AccessDenied(Unreachable):
    """It does not let us in: trying again is no use."""


class Unfinished(HandoffError):
    """The command goes on there; the same operation joins it."""


class Lost(HandoffError):
    """Nobody knows what became of the command: its supervisor was killed, or the host restarted."""


class Transport(Protocol):
    """One host. Safe to be cancelled: what runs there goes on."""

    name: str
    """For messages."""

    async def execute(
        self, service: str, token: int, operation: str, command: str, timeout: float, *, retry_lost: bool = False
    ) -> Done:
        """Have the host run a line for `sh -c`, once under this id, whatever becomes of sessions.

        Raises Unreachable, Unfinished at the timeout, Lost, and HandoffError with the exit code of what was refused:
        ABORTED for an old token, REFUSED for another command under this id, LOCKED for one of an older deployer that
        still runs. With `retry_lost` a lost one is run again.
        """

    async def stop(self, service: str, token: int, operation: str, timeout: float) -> Done:
        """End the operation's command, and say how it ended. Raises as `execute` does."""

    async def request(self, argv: Sequence[str], stdin: bytes, timeout: float) -> bytes:
        """Run a short command there; what it writes to stdout. A first word `handoff` is the one for this host.

        Not tried again. Raises Unreachable, and HandoffError with the command's exit code for any but 0.
        """

    async def aclose(self) -> None:
        """End the connection, if there is one. Raises nothing but cancellation."""


class _Answer(msgspec.Struct, frozen=True):
    operation: str
    state: Literal["done", "running", "lost"]
    exit_code: int | None = None
    output: str = ""
    seconds: float = 0.0


class Host(abc.ABC):
    """What all transports share: they differ in `_run`."""

    def __init__(self, name: str, handoff: Sequence[str], gate: asyncio.Semaphore | None) -> None:
        """`gate`, borrowed: at most so many processes of ours at once, over all hosts that share it."""
        self.name = name
        self._handoff = tuple(handoff)
        self._gate = gate

    async def execute(
        self, service: str, token: int, operation: str, command: str, timeout: float, *, retry_lost: bool = False
    ) -> Done:
        options = ["--retry-lost"] if retry_lost else []
        return await self._operate("exec", service, token, operation, options, ["sh", "-c", command], timeout)

    async def stop(self, service: str, token: int, operation: str, timeout: float) -> Done:
        return await self._operate("stop", service, token, operation, [], [], timeout)

    async def request(self, argv: Sequence[str], stdin: bytes, timeout: float) -> bytes:
        words = [*self._handoff, *argv[1:]] if argv[:1] == ["handoff"] else list(argv)
        _check_words(self.name, words)
        async with self._slot():
            ran = await self._run(words, stdin, timeout)
        if ran.exit_code:
            raise self._failure(ran)
        return ran.output

    async def _operate(
        self,
        verb: str,
        service: str,
        token: int,
        operation: str,
        options: Sequence[str],
        command: Sequence[str],
        timeout: float,
    ) -> Done:
        _check_words(self.name, command)
        fixed = [*self._host_command(), verb, "--service", service, "--token", str(token), "--operation", operation]
        words = [*options, *(["--", *command] if command else [])]
        clock = asyncio.get_running_loop()
        deadline = clock.time() + timeout
        delay = FIRST_DELAY_SECONDS
        for left in reversed(range(MAXIMUM_TRIES)):
            try:
                async with self._slot():
                    seconds = min(max(0.0, round(deadline - clock.time(), 3)), MAX_DURATION_SECONDS)
                    waits = ["--timeout", format_duration(seconds)]
                    ran = await self._run([*fixed, *waits, *words], b"", seconds + ANSWER_SECONDS)
                return self._outcome(ran, operation, timeout)
            except AccessDenied:
                raise
            except Unreachable:
                if not left or clock.time() + delay > deadline:
                    raise
            await asyncio.sleep(delay)
            delay *= 2
        raise AssertionError("the last try returns or raises")

    def _outcome(self, ran: Ran, operation: str, timeout: float) -> Done:
        """Raises what `execute` raises."""
        answer = _answer(ran.output)
        if answer is None:
            raise self._failure(ran)
        match answer.state:
            case "done":
                return Done(255 if answer.exit_code is None else answer.exit_code, answer.output)
            case "running":
                text = f"operation {operation} still runs after {format_duration(timeout)}; it goes on there"
                raise Unfinished(f"{self.name}: {text}", ExitCode.TIMED_OUT)
            case "lost":
                text = f"operation {operation}: nobody knows what became of it (killed, or the host restarted)"
                raise Lost(f"{self.name}: {text}; look at the host, then have it run again", ExitCode.PARTIAL)

    def _failure(self, ran: Ran) -> HandoffError:
        said = last_line(ran.errors).removeprefix("handoff: error: ")
        try:
            code = ExitCode(ran.exit_code)
        except ValueError:
            code = ExitCode.FAILED
        if ran.exit_code == 0:
            return HandoffError(f"{self.name}: gave no answer that this release can read; is it of the same release?")
        how = f"exit code {ran.exit_code}" if ran.exit_code > 0 else f"killed by signal {-ran.exit_code}"
        return HandoffError(f"{self.name}: {said or how}", code)

    def _slot(self) -> contextlib.AbstractAsyncContextManager[object]:
        return contextlib.nullcontext() if self._gate is None else self._gate

    @abc.abstractmethod
    async def _run(self, argv: Sequence[str], stdin: bytes, timeout: float) -> Ran:
        """Raises Unreachable, and HandoffError."""

    def _host_command(self) -> Sequence[str]:
        return (*self._handoff, "host")

    async def aclose(self) -> None:  # noqa: B027
        """There may be nothing to end."""


class LocalHost(Host):
    """The machine that the deployer runs on."""

    def __init__(self, handoff: Sequence[str] = (), gate: asyncio.Semaphore | None = None) -> None:
        super().__init__("this machine", handoff or (sys.executable, "-P", "-m", "handoff"), gate)
        self._is_our_own = not handoff

    def _host_command(self) -> Sequence[str]:
        return (sys.executable, "-P", "-m", "lb.host") if self._is_our_own else super()._host_command()

    async def _run(self, argv: Sequence[str], stdin: bytes, timeout: float) -> Ran:
        try:
            return await run(argv, stdin, timeout)
        except TimeoutError:
            text = f"{self.name}: {argv[0]}: no answer within {timeout:g} s"
            raise Unreachable(text, ExitCode.TIMED_OUT) from None
        except Flooded as error:
            raise HandoffError(f"{self.name}: {argv[0]}: {error.message}") from None
        except (OSError, ValueError) as error:
            raise HandoffError(f"{self.name}: {argv[0]}: {getattr(error, 'strerror', None) or error}") from None


def transport_for(
    ssh: str | None,
    handoff: str = "handoff",
    *,
    gate: asyncio.Semaphore | None = None,
    ssh_config: str | None = None,
) -> Transport:
    """None: this machine. `handoff`: the command there, in words of a shell. `ssh_config`: instead of the user's.

    Raises UsageError for what cannot be.
    """
    from lb.rollout.ssh import SshHost

    try:
        words = tuple(shlex.split(handoff))
    except ValueError as error:
        raise UsageError(f"handoff = {handoff!r}: expected a command ({str(error).lower()})") from None
    if not words or "\0" in handoff:
        raise UsageError(f"handoff = {handoff!r}: expected a command")
    if ssh is None:
        return LocalHost(() if handoff == "handoff" else words, gate)
    return SshHost(ssh, words, gate, ssh_config)


def _check_words(name: str, words: Sequence[str]) -> None:
    if any("\0" in word for word in words):
        raise UsageError(f"{name}: a command with a NUL; no command can have one")


def _answer(output: bytes) -> _Answer | None:
    """The last line; before it, a login shell may greet."""
    lines = output.strip().splitlines()
    if not lines:
        return None
    try:
        return msgspec.json.decode(lines[-1], type=_Answer)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "".join(one if one.isprintable() else "?" for one in lines[-1]) if lines else ""
