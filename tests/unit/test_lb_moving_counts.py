"""Whatever moves, in whatever order: a connection is counted at its backend all the time, and `maxconn` holds."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from lb.relay.letters import RelayLetter, decode
from tests.unit.fds import open_fds
from tests.unit.test_lb_engine import Backend, endpoint
from tests.unit.test_lb_moving import Post, Two

MAXCONN = 3
SIDES = st.booleans()
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("connect"), SIDES, st.just(0)),
        st.tuples(st.sampled_from(["leave", "end"]), SIDES, st.integers(0, 5)),
        st.tuples(st.just("hand over"), SIDES, st.integers(0, 4)),
        st.tuples(st.just("adopt"), SIDES, st.just(0)),
        st.tuples(st.just("turn"), SIDES, st.integers(1, 3)),
        st.tuples(st.just("table"), SIDES, st.just(0)),
    ),
    max_size=40,
)


class Mailboxes(Post):
    """Of two workers that hand over to each other: one for each, and both are read by their owners only."""

    def __init__(self, other: list[tuple[list[int], bytes]], own: list[tuple[list[int], bytes]]) -> None:
        super().__init__()
        self.letters, self.own = other, own

    @property  # type: ignore[override]
    def has_unread(self) -> bool:
        return bool(self.letters)

    @has_unread.setter
    def has_unread(self, _: bool) -> None:
        pass

    def adopted_fds(self) -> list[tuple[list[int], bytes]]:
        found = list(self.own)
        self.own.clear()
        return found


class World(Two):
    def __init__(self, tmp_path: Path) -> None:
        super().__init__(tmp_path)
        to_new: list[tuple[list[int], bytes]] = []
        to_old: list[tuple[list[int], bytes]] = []
        self.backend = Backend()
        self.boxes = {self.old: Mailboxes(to_new, to_old), self.new: Mailboxes(to_old, to_new)}
        self.table()
        for rig, box in self.boxes.items():
            self.post = box
            self.moving(rig)

    def table(self) -> None:
        self.serve(endpoint(self.backend, maxconn=MAXCONN), per_source=100)

    def act(self, name: str, is_old: bool, number: int) -> None:
        rig = self.old if is_old else self.new
        match name:
            case "connect" if len(rig.clients) < 8:
                rig.client(b"x")
            case "leave" if number < len(rig.clients):
                rig.clients[number].close()
            case "end" if number < self.backend.look():
                self.backend.accepted[number].close()
            case "hand over":
                self.boxes[rig].room = number
                self.moving(rig).hand_over_some(())
            case "adopt":
                self.moving(rig).adopt_some()
            case "table":
                self.table()
            case _:
                for _ in range(number):
                    rig.loop.turn(0)

    @property
    def relayed(self) -> int:
        """Here, there, and under way."""
        letters = [data for box in self.boxes.values() for _, data in box.letters]
        under_way = sum(isinstance(decode(data, _fds(data)), RelayLetter) for data in letters)
        return self.old.engine.connections + self.new.engine.connections + under_way

    def check(self) -> None:
        [target] = self.new.engine._targets
        assert self.relayed <= target.connections
        assert self.relayed <= MAXCONN

    def finish(self) -> None:
        for one in (*self.old.clients, *self.new.clients, *self.backend.accepted):
            one.close()
        self.backend.listener.close()

        def is_over() -> bool:
            for rig, box in self.boxes.items():
                rig.loop.turn(0.001)
                box.room = 1000
                self.moving(rig).adopt_some()
            self.boxes[self.old].room = self.boxes[self.new].room = 0  # what is there stays
            for rig in self.boxes:
                self.moving(rig).hand_over_some(())
            return not any(rig.engine.connections + rig.engine.waiting for rig in self.boxes)

        self.new.until(is_over, "all have ended")
        for rig in self.boxes:
            assert self.moving(rig).is_settled
            assert not rig.engine._services["shop"].dispatcher.sources
        self.new.close()
        self.old.close()
        self.new.page.close()
        self.old.page.close()


def _fds(data: bytes) -> int:
    return 1 if msgspec.msgpack.decode(data)["type"].startswith("attempt") else 2


@given(actions=ACTIONS)
@settings(max_examples=60, deadline=None)
def test_a_connection_is_counted_wherever_it_is_and_no_place_is_given_twice(
    actions: list[tuple[str, bool, int]],
) -> None:
    before = open_fds()
    with tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory))
        for action in actions:
            world.act(*action)
            world.check()
        world.finish()
    left = open_fds() - before
    assert not [name for name in left if name.startswith(("socket:", "pipe:"))]
