"""WebSockets that move: the client's connection, its counter and its compression go on in the new worker."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.system.harness import DEADLINE_SECONDS, Service, wait_until

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "websocket_counter"
OPTIONS = ("--websockets", "hand-over")

APPLICATION = """
import asyncio, os

async def app(scope, receive, send):
    if scope["type"] != "websocket":
        return
    state = scope["extensions"]["handoff"]["state"]
    await receive()
    await send({"type": "websocket.accept", "subprotocol": "chat" if "chat" in scope["subprotocols"] else None})
    while True:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            state.setdefault("codes", []).append(message["code"])
            if state.get("bad"):
                state["bad"] = {1, 2}
            return
        text = message.get("text")
        if text == "bad":
            state["bad"] = True
        answer = text if text is not None else message["bytes"]
        if text == "who":
            answer = f"{os.getpid()} {scope['path']} {scope['query_string'].decode()} {state.get('codes', [])}"
        key = "text" if isinstance(answer, str) else "bytes"
        await send({"type": "websocket.send", key: answer})
"""


def url(service: Service, path: str = "/") -> str:
    return f"ws://127.0.0.1:{service.port}{path}"


def reload(service: Service) -> None:
    done = service.ask({"type": "reload"})
    assert done["exit_code"] == 0, done
    service.wait_for_generations(service.status()["live"])


@pytest.fixture
def application(directory: Path) -> Path:
    (directory / "main.py").write_text(APPLICATION)
    return directory


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("compression", ["deflate", None])
def test_counters_go_on_through_reloads_while_messages_are_sent(tmp_path: Path, loop: str, compression: Any) -> None:
    directory = Path(shutil.copytree(EXAMPLE, tmp_path / "app"))
    with Service(directory, "--loop", loop, *OPTIONS) as service, connect(url(service), compression=compression) as one:
        stop, all_counted, sent, answers = threading.Event(), threading.Event(), [0], []

        def send() -> None:
            while not stop.wait(0.002):
                one.send("x" * 100)
                sent[0] += 1

        def receive() -> None:
            while not all_counted.is_set() or len(answers) < sent[0]:
                answers.append(one.recv(timeout=DEADLINE_SECONDS))

        threads = [threading.Thread(target=send), threading.Thread(target=receive)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(4):
                reload(service)
        finally:
            stop.set()
            threads[0].join(DEADLINE_SECONDS)
            sent[0] += 1
            all_counted.set()
            one.send("the last one wakes who waits for an answer")
            threads[1].join(DEADLINE_SECONDS)
        assert answers == [str(number) for number in range(1, sent[0] + 1)]
        assert service.status()["moves"]["adopted"] == 4


def who(websocket: ClientConnection) -> tuple[int, str]:
    websocket.send("who")
    pid, _, rest = str(websocket.recv(timeout=DEADLINE_SECONDS)).partition(" ")
    return int(pid), rest


def test_the_scope_is_the_same_and_the_old_task_ended_with_1012(application: Path) -> None:
    with (
        Service(application, *OPTIONS) as service,
        connect(url(service, "/room?key=1"), subprotocols=["chat"]) as websocket,  # type: ignore[list-item]
    ):
        old, rest = who(websocket)
        assert rest == "/room key=1 []"
        reload(service)
        new, rest = who(websocket)
        assert (new == service.workers()[0]["pid"] != old, rest) == (True, "/room key=1 [1012]")
        assert websocket.subprotocol == "chat"
        reload(service)
        assert who(websocket)[1] == "/room key=1 [1012, 1012]"
        assert websocket.ping().wait(DEADLINE_SECONDS)


def test_a_message_in_fragments_is_waited_for(application: Path) -> None:
    with Service(application, *OPTIONS) as service, connect(url(service)) as websocket:
        go = threading.Event()

        def parts() -> Any:
            yield "first "
            go.wait(DEADLINE_SECONDS)
            yield "last"

        sender = threading.Thread(target=lambda: websocket.send(parts()))
        sender.start()
        assert service.ask({"type": "reload"})["exit_code"] == 0
        wait_until(lambda: [one["state"] for one in service.workers(1)] == ["draining"], "the old worker drains")
        go.set()
        sender.join(DEADLINE_SECONDS)
        assert websocket.recv(timeout=DEADLINE_SECONDS) == "first last"
        service.wait_for_generations(2)
        assert who(websocket)[0] == service.workers()[0]["pid"]


def test_a_state_that_is_no_json_ends_with_1012_and_is_counted(application: Path) -> None:
    with Service(application, *OPTIONS) as service, connect(url(service)) as websocket:
        websocket.send("bad")
        assert websocket.recv() == "bad"
        assert service.ask({"type": "reload"})["exit_code"] == 0
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv(timeout=DEADLINE_SECONDS)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012
        assert service.status()["moves"]["refused"] == 1
        service.stderr.wait_for("is no JSON")


def test_without_the_option_websockets_stay_where_they_are(application: Path) -> None:
    (application / "main.py").write_text(APPLICATION.replace('["extensions"]["handoff"]["state"]', '["state"]'))
    with Service(application) as service, connect(url(service)) as websocket:
        old, _ = who(websocket)
        assert service.ask({"type": "reload"})["exit_code"] == 0
        assert who(websocket)[0] == old
        assert json.dumps(service.status()["moves"]["moved"]) == "0"
