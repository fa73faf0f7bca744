"""Logging inside a worker: uvicorn's loggers, with the generation and the label in every line of the access log."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from uvicorn.config import Config

from handoff.core.messages import Boot
from handoff.worker.load import BootFailure

BAD_CONFIGURATION = (ValueError, TypeError, LookupError, RuntimeError, OSError, ImportError)
"""What uvicorn and logging.config raise for a configuration that they cannot take."""


def _stamp(record: logging.LogRecord) -> str:
    """As the master writes it."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created))
    return f"{stamp}.{int(record.msecs):03d}"


class TextFormatter(logging.Formatter):
    """Time, level, logger, message, as the lines of the master; whose it is comes last."""

    def __init__(self, suffix: str) -> None:
        super().__init__(f"%(message)s{suffix}")

    def format(self, record: logging.LogRecord) -> str:
        return f"{_stamp(record)} {record.levelname.lower():<7} {record.name} {super().format(record)}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line. Access lines of uvicorn are taken apart into fields."""

    def __init__(self, generation: int, label: str) -> None:
        super().__init__()
        self._constant = {"generation": generation, "label": label}

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": _stamp(record),
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


def _suffix(boot: Boot) -> str:
    """Which version wrote a line: the end of a format of logging."""
    text = f" generation={boot.generation}" + (f" label={boot.label}" if boot.label else "")
    return text.replace("%", "%%")


def log_config(boot: Boot) -> dict[str, Any] | str:
    """What uvicorn's Config takes as `log_config`: the operator's own file, or ours."""
    file = boot.settings.log_config
    if file is not None:
        return file
    suffix = _suffix(boot)
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


def configure_program(boot: Boot) -> None:
    """Logging of a program with main(worker): the operator's own file, or all loggers in our format on stderr."""
    if boot.settings.log_config is not None:
        try:
            Config("", log_config=log_config(boot))
        except BAD_CONFIGURATION as error:
            raise BootFailure(f"log configuration {boot.settings.log_config}: {error}") from None
        return
    handler = logging.StreamHandler()
    if boot.settings.log_format == "json":
        handler.setFormatter(JsonFormatter(boot.generation, boot.label))
    else:
        handler.setFormatter(TextFormatter(_suffix(boot)))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
