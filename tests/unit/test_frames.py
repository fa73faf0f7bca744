"""Frames of WebSockets, cut anywhere, come out whole."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode

from handoff.worker.frames import FrameSplitter, frame_size

FRAMES = st.builds(
    lambda opcode, data, fin: Frame(opcode, data, fin).serialize(mask=True),
    st.sampled_from([Opcode.TEXT, Opcode.BINARY, Opcode.CONT]),
    st.one_of(st.binary(max_size=200), st.sampled_from([bytes(125), bytes(126), bytes(65535), bytes(65536)])),
    st.booleans(),
)


@given(FRAMES, st.binary(max_size=5))
def test_the_size_is_that_of_the_frame_and_known_from_its_head(frame: bytes, later: bytes) -> None:
    assert frame_size(frame + later) == len(frame)
    assert all(frame_size(frame[:cut]) in (None, len(frame)) for cut in range(min(len(frame), 20)))


@given(st.lists(FRAMES, max_size=4), st.data())
def test_what_comes_out_is_whole_frames_and_nothing_is_lost(frames: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(frames)
    ends = {sum(map(len, frames[:count])) for count in range(len(frames) + 1)}
    splitter, out, begin = FrameSplitter(1_000_000), b"", 0
    while begin < len(stream):
        end = data.draw(st.integers(begin + 1, len(stream)))
        out += splitter.add(stream[begin:end])
        begin = end
        assert len(out) in ends
        assert out + splitter.rest == stream[:end]
    assert out == stream


def test_a_frame_that_claims_too_much_is_given_out_for_the_parser_to_refuse() -> None:
    splitter = FrameSplitter(1000)
    head = Frame(Opcode.BINARY, bytes(5000)).serialize(mask=True)[:20]
    assert splitter.add(head) == head
