"""Applications for tests, as text: each test writes what it serves into a directory of its own."""

HELLO = '''
import asyncio, os

VERSION = "{version}"

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({{"type": message["type"] + ".complete"}})
            if message["type"] == "lifespan.shutdown":
                return
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    path = scope["path"]
    if path == "/pid":
        answer = str(os.getpid()).encode()
    elif path == "/slow":
        await asyncio.sleep(float(scope["query_string"] or b"0.5"))
        answer = b"slow " + VERSION.encode()
    elif path == "/echo":
        answer = body
    elif path == "/stream":
        await send({{"type": "http.response.start", "status": 200, "headers": []}})
        for number in range(20):
            await send({{"type": "http.response.body", "body": b"%d\\n" % number, "more_body": True}})
            await asyncio.sleep(0.05)
        await send({{"type": "http.response.body", "body": b"end"}})
        return
    else:
        answer = VERSION.encode()
    headers = [(b"content-length", b"%d" % len(answer))]
    await send({{"type": "http.response.start", "status": 200, "headers": headers}})
    await send({{"type": "http.response.body", "body": answer}})
'''


def hello(version: str) -> str:
    """Answers its version; also /pid, /slow?SECONDS, /echo and /stream (twenty numbers and "end", over a second)."""
    return HELLO.format(version=version)
