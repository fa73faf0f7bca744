"""`handoff lb …`: the balancer's commands."""

from __future__ import annotations

from lb.cli.commands import main

__all__ = ["main"]
