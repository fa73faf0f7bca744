"""Applications for tests, as text: each test writes what it serves into a directory of its own."""

HELLO = """
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
"""


def hello(version: str) -> str:
    """Answers its version; also /pid, /slow?SECONDS, /echo and /stream (twenty numbers and "end", over a second)."""
    return HELLO.format(version=version)


WORKBENCH = '''
import asyncio, json, os, subprocess, sys, time

VERSION = "@VERSION@"

def mark(name):
    with open(name + ".tmp", "w") as file:
        file.write(VERSION)
    os.rename(name + ".tmp", name)

async def until(name):
    mark(name + ".began")
    while not os.path.exists(name):
        await asyncio.sleep(0.01)

async def app(scope, receive, send):
    await {"lifespan": lifespan, "http": http, "websocket": websocket}[scope["type"]](scope, receive, send)

async def lifespan(scope, receive, send):
    while True:
        message = await receive()
        if message["type"] == "lifespan.shutdown":
            mark(f"shutdown-{os.getpid()}")
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return

async def websocket(scope, receive, send):
    await receive()
    await send({"type": "websocket.accept"})
    while True:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            return
        await send({"type": "websocket.send", "text": f"{VERSION}:{message['text']}"})

CHILD = """import json, os
fds = {}
for fd in os.listdir("/proc/self/fd"):
    try:
        fds[fd] = os.readlink("/proc/self/fd/" + fd)
    except OSError:
        pass
print(json.dumps({"fds": fds, "environment": sorted(os.environ)}))
"""

async def http(scope, receive, send):
    path, query = scope["path"], scope["query_string"].decode()
    if path == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begin\\n", "more_body": True})
        await until(query)
        await send({"type": "http.response.body", "body": b"end\\n"})
        return
    answer = VERSION
    if path == "/pid":
        answer = str(os.getpid())
    elif path == "/until":
        await until(query)
    elif path == "/echo":
        answer, more = query, scope["method"] == "POST"
        while more:
            message = await receive()
            answer, more = answer + message.get("body", b"").decode(), message.get("more_body", False)
    elif path == "/where":
        answer = json.dumps({"version": VERSION, "directory": os.getcwd(), "prefix": sys.prefix})
    elif path == "/environment":
        answer = json.dumps({key: value for key, value in os.environ.items() if key.startswith("HANDOFF_")})
    elif path == "/block":
        mark(query)
        time.sleep(1000)
    elif path == "/grandchild":
        command = [sys.executable, "-c", CHILD]
        answer = subprocess.run(command, close_fds=False, stdout=subprocess.PIPE, text=True).stdout
    body = answer.encode()
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
    if path == "/background":
        await until(query)
        mark(query + ".done")
'''


def workbench(version: str) -> str:
    """Answers its version; /until?NAME and /stream?NAME go on when the file NAME is there (NAME.began: it waits).

    /background?NAME does so after its answer and then makes NAME.done; /block?NAME makes NAME and blocks the loop for
    good; /echo, /pid, /where, /environment, /grandchild; WebSockets echo. Shutting down makes the file shutdown-PID.
    """
    return WORKBENCH.replace("@VERSION@", version)


GATE = """
import os, time
with open("importing", "w"):
    pass
while not os.path.exists("go"):
    time.sleep(0.01)
"""


def gated(version: str) -> str:
    """hello(version), whose import makes the file `importing` and goes on when there is a file `go`."""
    return GATE + hello(version)
