"""FastAPI: lifespan, a WebSocket, a stream and a background task.

handoff run main:app --chdir examples/fastapi_app
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import BackgroundTasks, FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import StreamingResponse

notes: list[str] = []


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.greeting = "Hello from FastAPI!"  # open pools and connections here: a failure rolls the reload back
    yield


app = FastAPI(lifespan=lifespan)


@app.get("/")
async def hello() -> dict[str, str]:
    return {"greeting": app.state.greeting}


@app.post("/notes")
async def note(text: str, tasks: BackgroundTasks) -> dict[str, int]:
    tasks.add_task(notes.append, text)  # a drain waits for it
    return {"notes": len(notes)}


@app.get("/count")
async def count() -> StreamingResponse:
    async def numbers() -> AsyncIterator[bytes]:
        for number in range(10):
            yield b"%d\n" % number
            await asyncio.sleep(0.05)

    return StreamingResponse(numbers(), media_type="text/plain")


@app.websocket("/echo")
async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    try:
        while True:
            await websocket.send_text(await websocket.receive_text())
    except WebSocketDisconnect:
        return
