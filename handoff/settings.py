"""What a service was asked to be: the settings, and the paths as the operator typed them."""

from __future__ import annotations

import shlex
from typing import Any, Literal

import msgspec

Interface = Literal["auto", "asgi", "wsgi", "handoff"]
Loop = Literal["uvloop", "asyncio"]
ListenMode = Literal["shared", "reuseport"]
LogFormat = Literal["text", "json"]
Dialect = Literal["auto", "systemd", "server-starter", "einhorn"]


class CompanionSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one companion is; the fields mean the same as those of `Settings`. None: as the service has it."""

    app: str = ""
    command: tuple[str, ...] = ()
    factory: bool = False
    binds: tuple[str, ...] = ()
    interface: Interface = "auto"
    loop: Loop | None = None
    threads: int | None = None
    dialect: Dialect = "auto"
    ready_after_seconds: float | None = None
    watchdog_seconds: float | None = None
    drain_signal: str = "TERM"
    boot_timeout_seconds: float | None = None
    stop_timeout_seconds: float | None = None


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One generation's settings, merged and checked. Durations are in seconds.

    Travels to the worker as JSON, so every field is plain data.
    """

    app: str = ""
    """Empty: the workers are processes of `command`."""
    command: tuple[str, ...] = ()
    """A program of any language and its arguments; the dialect says how it gets listeners and says that it is ready."""
    dialect: Dialect = "auto"
    ready_after_seconds: float | None = None
    """A command that lives this long counts as ready; None: as its dialect has it."""
    watchdog_seconds: float | None = None
    """A command must say WATCHDOG=1 within so long, again and again."""
    drain_signal: str = "TERM"
    """What asks a command to drain."""
    factory: bool = False
    binds: tuple[str, ...] = ()
    """Addresses as typed, `[NAME=]ADDR`; empty means the default, or the sockets that were inherited."""
    backlog: int = 2048
    freebind: bool = False
    """Addresses may be bound that this machine does not have yet: one that moves here later."""
    listen_mode: ListenMode = "shared"
    workers: int = 1
    threads: int = 10
    interface: Interface = "auto"
    loop: Loop = "uvloop"
    name: str
    label: str = ""
    check: str | None = None
    check_timeout_seconds: float = 5.0
    warm_up: tuple[str, ...] = ()
    boot_timeout_seconds: float = 30.0
    probation_seconds: float = 1.0
    surge: int | None = None
    """How many workers a reload replaces at first and then at a time; None means all at once."""
    drain_timeout_seconds: float = 30.0
    stop_timeout_seconds: float = 30.0
    max_generations: int = 3
    keep_alive_seconds: float = 75.0
    request_timeout_seconds: float | None = None
    limit_concurrency: int | None = None
    forwarded_allow_ips: str | None = None
    root_path: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    access_log: bool = True
    proxy_protocol: Literal["off", "accept", "require"] = "off"
    proxy_from: tuple[str, ...] = ()
    """Networks whose PROXY headers are believed; `unix` stands for peers on a unix socket. Empty: what is local."""
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None
    """Clients must show a certificate that one of these has signed."""
    websockets: Literal["hand-over", "close"] = "close"
    log_format: LogFormat = "text"
    log_config: str | None = None
    generation_header: bool = False
    uvicorn: dict[str, Any] = {}
    """Other settings of uvicorn, from the table `[uvicorn]`, passed through as they are."""
    arguments: dict[str, Any] = {}
    """What a program `main(worker)` finds in `worker.arguments`: plain data of its own."""
    companions: dict[str, CompanionSettings] = {}
    """By name, from the tables `[companion.NAME]`."""

    def of_companion(self, name: str) -> Settings:
        """The settings of a companion's process: its own, and those of the service that are for every process."""
        own = self.companions[name]
        given = {field: getattr(own, field) for field in own.__struct_fields__ if getattr(own, field) is not None}
        shared = ("name", "label", "loop", "threads", "boot_timeout_seconds", "stop_timeout_seconds", "log_format")
        taken = {field: getattr(self, field) for field in (*shared, "log_config", "arguments")} | given
        return Settings(**taken, drain_timeout_seconds=taken["stop_timeout_seconds"])

    @property
    def runs(self) -> str:
        """The application or the command, for people."""
        return self.app or shlex.join(self.command)


class TLSFiles(msgspec.Struct, frozen=True, kw_only=True):
    """What the files of TLS held. Travels to the worker, and is never shown."""

    cert: bytes
    key: bytes
    ca: bytes | None = None

    def __repr__(self) -> str:
        return f"<TLSFiles of {len(self.cert)} bytes>"


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator typed at `handoff run`; every reload starts again from this.

    Paths are absolute, but their symlinks are not resolved: a release directory behind a switched link is
    resolved afresh for each generation.
    """

    overrides: dict[str, Any]
    """Settings given on the command line, under the names of the fields of `Settings`."""
    directory: str
    python: str
    config: str | None
    """The file given with `--config`; None means `handoff.toml` in the directory, if there is one."""
    env_file: str | None
    describe: tuple[str, ...] = ()
    """A command that prints, as JSON, what would stand in the file; it is run anew for each reload."""
    described: dict[str, Any] | None = None
    """What it printed last."""
    environment: dict[str, str]
    """The environment `handoff run` was started with, less LISTEN_*, NOTIFY_SOCKET and HANDOFF_*."""


class Pins(msgspec.Struct, frozen=True, kw_only=True):
    """What one generation is pinned to, for as long as it lives and for a rollback to it."""

    directory: str
    python: str
    environment: dict[str, str]
    settings: Settings
    executable: str = ""
    """Of a command: the file that is executed."""
    tls: TLSFiles | None = None
