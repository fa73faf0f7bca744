"""The smallest application: ASGI, no framework. Change the text, `handoff reload`, and nobody loses a request."""

TEXT = b"Hello from handoff!\n"


async def app(scope, receive, send):
    assert scope["type"] == "http"
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(TEXT))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": TEXT})
