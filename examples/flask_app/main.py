"""Flask, on the WSGI bridge: a plain answer, a form, and a streamed one.

handoff run main:app --chdir examples/flask_app --threads 20
"""

from __future__ import annotations

from collections.abc import Iterator

from flask import Flask, Response, request

app = Flask(__name__)


@app.get("/")
def hello() -> str:
    return "Hello from Flask!\n"


@app.post("/shout")
def shout() -> str:
    return request.get_data(as_text=True).upper()


@app.get("/count")
def count() -> Response:
    def numbers() -> Iterator[str]:
        for number in range(10):
            yield f"{number}\n"

    return Response(numbers(), mimetype="text/plain")
