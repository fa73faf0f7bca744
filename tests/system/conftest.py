from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.apps import hello


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with the hello application, version 1, as main.py."""
    found = tmp_path / "app"
    found.mkdir()
    (found / "main.py").write_text(hello("1"))
    return found
