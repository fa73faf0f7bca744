"""Logging inside a worker: uvicorn's loggers, with the generation and the label in every line of the access log."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from handoff.core.messages import Boot


class JsonFormatter(logging.Formatter):
    """One JSON object a line. Access lines of uvicorn are taken apart into fields."""

    def __init__(self, generation: int, label: str) -> None:
        super().__init__()
        self._constant = {"generation": generation, "label": label}

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created))
        fields: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
            **self._constant,
        }
        if record.name == "uvicorn.access" and isinstance(record.args, tuple) and len(record.args) == 5:
            names = ("peer", "method", "path", "http_version", "status")
            fields |= dict(zip(names, record.args, strict=True))
        else:
            fields["message"] = record.getMessage()
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def log_config(boot: Boot) -> dict[str, Any] | str:
    """What uvicorn's Config takes as `log_config`: the operator's own file, or ours."""
    if boot.settings.log_config is not None:
        return boot.settings.log_config
    suffix = f" generation={boot.generation}" + (f" label={boot.label}" if boot.label else "")
    suffix = suffix.replace("%", "%%")
    if boot.settings.log_format == "json":
        formatter = {"()": JsonFormatter, "generation": boot.generation, "label": boot.label}
        formatters: dict[str, Any] = {"default": formatter, "access": formatter}
    else:
        access = '%(levelprefix)s %(client_addr)s - "%(request_line)s" %(status_code)s' + suffix
        formatters = {
            "default": {"()": "uvicorn.logging.DefaultFormatter", "fmt": "%(levelprefix)s %(message)s" + suffix},
            "access": {"()": "uvicorn.logging.AccessFormatter", "fmt": access},
        }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": formatters,
        "handlers": {
            "default": {"formatter": "default", "class": "logging.StreamHandler", "stream": "ext://sys.stderr"},
            "access": {"formatter": "access", "class": "logging.StreamHandler", "stream": "ext://sys.stdout"},
        },
        "loggers": {
            "uvicorn": {"handlers": ["default"], "level": "INFO", "propagate": False},
            "uvicorn.error": {"level": "INFO"},
            "uvicorn.access": {"handlers": ["access"], "level": "INFO", "propagate": False},
        },
    }
