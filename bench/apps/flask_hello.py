"""Flask's hello."""

from __future__ import annotations

from flask import Flask

from bench.apps import deployed

VERSION = deployed.version()
app = Flask(__name__)


@app.get("/")
def hello() -> str:
    return f"{VERSION:06d} Hello from the bench!\n"


deployed.announce(VERSION)
