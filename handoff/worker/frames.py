"""Where frames of WebSockets end in a client's bytes (RFC 6455, 5.2). Pure."""

from __future__ import annotations

_SHORT, _LONG = 126, 127


def frame_size(data: bytes | bytearray) -> int | None:
    """The whole size, head and payload, of the frame that `data` begins with; None: its head is not complete."""
    if len(data) < 2:
        return None
    length = data[1] & 0x7F
    head = 2 + (4 if data[1] & 0x80 else 0)
    if length == _SHORT:
        head += 2
        if len(data) < 4:
            return None
        length = int.from_bytes(data[2:4], "big")
    elif length == _LONG:
        head += 8
        if len(data) < 10:
            return None
        length = int.from_bytes(data[2:10], "big")
    return head + length


class FrameSplitter:
    """Collects bytes, and gives them out in whole frames."""

    def __init__(self, maximum_bytes: int) -> None:
        """A frame that claims more than `maximum_bytes` is given out as it comes: the parser is to refuse it."""
        self._maximum_bytes = maximum_bytes
        self._buffer = bytearray()

    def add(self, data: bytes) -> bytes:
        """What is complete now, of all that came."""
        self._buffer += data
        end = 0
        view = memoryview(self._buffer)
        while (size := frame_size(bytes(view[end : end + 14]))) is not None:
            if size > self._maximum_bytes:
                end = len(view)
                break
            if end + size > len(view):
                break
            end += size
        found = bytes(view[:end])
        view.release()
        del self._buffer[:end]
        return found

    @property
    def rest(self) -> bytes:
        """The frame that has begun."""
        return bytes(self._buffer)

    @property
    def rest_bytes(self) -> int:
        return len(self._buffer)
