"""Long-lived connections whose every byte is checked, at both ends: echoes, downloads, uploads."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
from types import TracebackType

from tests.system.harness import DEADLINE_SECONDS

BLOCK = b"".join(number.to_bytes(4, "big") for number in range(64 * 1024))
"""What goes in bulk, again and again: a byte lost, doubled or out of order is seen. 256 KiB."""
ECHO, DOWN, UP = b"e", b"d", b"u"


class StreamServer:
    """Serves on a thread. The first byte of a connection says what it is for: to be echoed, to be sent blocks until
    it is shut, or to be received until its end and told size and digest."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.opened = 0
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve_all(),))

    def __enter__(self) -> StreamServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(DEADLINE_SECONDS)
        self._loop.close()

    async def _serve_all(self) -> None:
        open_ones: set[asyncio.Task[None]] = set()

        def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(self._serve(reader, writer))
            open_ones.add(task)
            task.add_done_callback(open_ones.discard)

        server = await asyncio.start_server(begin, sock=self.listener, backlog=1000)
        await self._ended.wait()
        server.close()
        for task in open_ones:
            task.cancel()
        await asyncio.gather(*open_ones, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        try:
            kind = await reader.readexactly(1)
            if kind == ECHO:
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
            elif kind == DOWN:
                while not reader.at_eof():
                    writer.write(BLOCK)
                    await writer.drain()
                    await asyncio.sleep(0)
            elif kind == UP:
                size, digest = 0, hashlib.sha256()
                while data := await reader.read(1 << 18):
                    size += len(data)
                    digest.update(data)
                writer.write(f"{size} {digest.hexdigest()}".encode())
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


class Echo:
    """A client with one connection, asked again and again."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.connection = socket.create_connection(address, DEADLINE_SECONDS)
        self.connection.sendall(ECHO)
        self._number = 0

    def ask(self) -> None:
        """Raises where the answer is not what was sent."""
        self._number += 1
        question = self._number.to_bytes(8, "big") * (1 + self._number % 300)
        self.connection.sendall(question)
        answer = bytearray()
        while len(answer) < len(question):
            more = self.connection.recv(len(question) - len(answer))
            if not more:
                raise EOFError(f"after {self._number} exchanges")
            answer += more
        if answer != question:
            raise ValueError(f"exchange {self._number}: not what was sent")

    def close(self) -> None:
        self.connection.close()


class Download:
    """Reads blocks on a thread, and looks at every byte, until `finish`."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.connection = socket.create_connection(address, DEADLINE_SECONDS)
        self.connection.sendall(DOWN)
        self.size = 0
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        place = 0
        doubled = memoryview(BLOCK + BLOCK)
        try:
            while data := self.connection.recv(len(BLOCK)):
                if doubled[place : place + len(data)] != data:
                    self.failure = f"other bytes after {self.size}"
                    return
                place = (place + len(data)) % len(BLOCK)
                self.size += len(data)
        except OSError as error:
            self.failure = f"{error} after {self.size}"

    def finish(self) -> int:
        """Ends it in order. How many bytes there were, all of them right."""
        self.connection.shutdown(socket.SHUT_WR)
        self._thread.join(DEADLINE_SECONDS)
        assert not self._thread.is_alive(), "the download has ended"
        self.connection.close()
        assert self.failure is None, self.failure
        return self.size


class Upload:
    """Sends blocks on a thread, until `finish`."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.connection = socket.create_connection(address, DEADLINE_SECONDS)
        self.connection.sendall(UP)
        self.size = 0
        self.failure: str | None = None
        self._digest = hashlib.sha256()
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._is_ending.is_set():
                self.connection.sendall(BLOCK)
                self._digest.update(BLOCK)
                self.size += len(BLOCK)
        except OSError as error:
            self.failure = f"{error} after {self.size}"

    def finish(self) -> int:
        """Ends it in order. How many bytes there were, all of which the server got."""
        self._is_ending.set()
        self._thread.join(DEADLINE_SECONDS)
        assert not self._thread.is_alive(), "the upload has ended"
        assert self.failure is None, self.failure
        self.connection.shutdown(socket.SHUT_WR)
        answer = bytearray()
        while more := self.connection.recv(1000):
            answer += more
        self.connection.close()
        assert answer.decode() == f"{self.size} {self._digest.hexdigest()}"
        return self.size
