"""The page of connections: rows and columns, and what is left of those that died, in several processes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lb import page as page_module
from lb.page import CURRENT, FIELDS, ROWS, SENT_BYTES, TOTAL, Page, PageFull

WRITER = """
import sys
from pathlib import Path
from lb.page import CURRENT, TOTAL, Page
page = Page(Path(sys.argv[1]))
page.take_row()
cells = page.cells(page.column("shop/blue/b1"))
cells[CURRENT], cells[TOTAL] = 3, 10
print(page.row, flush=True)
sys.stdin.read()
cells.release()
page.close()
"""


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    made = Page(tmp_path / "connections")
    yield made
    made.close()


class Writer:
    """Another process that has 3 connections of 10 it made."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.row = int(self.process.stdout.readline())

    def end(self, is_killed: bool) -> None:
        if is_killed:
            self.process.kill()
        self.process.communicate(timeout=30)


def test_the_file_is_private_and_sparse(tmp_path: Path, page: Page) -> None:
    status = (tmp_path / "connections").stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_blocks * 512 < status.st_size / 10


def test_processes_have_rows_of_their_own_and_see_each_others_counts(tmp_path: Path, page: Page) -> None:
    page.take_row()
    first, second = Writer(tmp_path / "connections"), Writer(tmp_path / "connections")
    assert len({page.row, first.row, second.row}) == 3
    assert set(page.rows()) == {page.row, first.row, second.row}
    assert page.owner(first.row) == first.process.pid
    column = page.column("shop/blue/b1")
    cells = page.cells(column)
    cells[CURRENT] += 1
    assert page.current(column) == 7
    assert page.sums("shop/blue/b1")[TOTAL] == 20
    cells.release()
    for writer in (first, second):
        writer.end(is_killed=False)
    assert page.current(column) == 1
    assert page.sums("shop/blue/b1")[TOTAL] == 20
    assert page.rows() == (page.row,)


def test_what_a_dead_process_had_counts_no_more_and_what_it_did_does(tmp_path: Path, page: Page) -> None:
    writer = Writer(tmp_path / "connections")
    column = page.column("shop/blue/b1")
    assert page.sweep() == 0
    assert page.current(column) == 3
    writer.end(is_killed=True)
    assert page.sweep() == 1
    assert page.current(column) == 0
    assert page.sums("shop/blue/b1")[TOTAL] == 10
    assert page.owner(writer.row) == 0
    assert page.sweep() == 0


def test_the_row_of_a_dead_process_is_taken_again_and_begins_with_nothing(tmp_path: Path, page: Page) -> None:
    writer = Writer(tmp_path / "connections")
    writer.end(is_killed=True)
    assert page.take_row() == writer.row
    assert page.current(page.column("shop/blue/b1")) == 0
    assert page.owner(writer.row) == os.getpid()
    assert page.sums("shop/blue/b1")[TOTAL] == 10


def test_a_zombie_is_dead(tmp_path: Path, page: Page) -> None:
    writer = Writer(tmp_path / "connections")
    writer.process.kill()
    os.waitid(os.P_PID, writer.process.pid, os.WEXITED | os.WNOWAIT)
    assert page.sweep() == 1
    writer.end(is_killed=False)


def test_columns_stay_until_nobody_has_a_connection_there(page: Page) -> None:
    page.take_row()
    kept, used, gone = (page.column(name) for name in ("kept", "used", "gone"))
    assert len({kept, used, gone}) == 3
    cells = page.cells(used)
    cells[CURRENT], cells[SENT_BYTES] = 1, 5
    page.keep_only(["kept"])
    assert page.sums("used")[SENT_BYTES] == 5
    assert page.column("kept") == kept
    assert page.column("new") == gone  # it was free again
    cells[CURRENT] = 0
    page.keep_only(["kept", "new"])
    assert page.sums("used") == (0,) * FIELDS
    assert list(cells) == [0] * FIELDS  # who comes next begins with nothing
    assert page.column("next") == used
    cells.release()


def test_a_backend_that_comes_again_and_again_costs_nothing_more(tmp_path: Path) -> None:
    page = Page(tmp_path / "connections")
    page.take_row()
    assert page.cells(page.column("a")) is page.cells(page.column("a"))
    page.close()


def test_of_a_backend_without_a_column_there_is_nothing_to_say(page: Page) -> None:
    assert page.sums("never seen") == (0,) * FIELDS


def test_rows_and_columns_have_an_end(tmp_path: Path, page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [Page(tmp_path / "connections") for _ in range(ROWS - 1)]
    assert [one.take_row() for one in others] == list(range(1, ROWS))
    with pytest.raises(PageFull, match="256 relay workers"):
        page.take_row()
    for one in others:
        one.close()
    monkeypatch.setattr(page_module, "COLUMNS", 2)
    page.column("a"), page.column("b")
    with pytest.raises(PageFull, match="2 backends"):
        page.column("c")
    assert page.column("a") != page.column("b")


def test_a_link_in_place_of_the_page_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        Page(tmp_path / "link")
    assert (tmp_path / "elsewhere").read_text() == "precious"
