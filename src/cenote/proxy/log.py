"""Structured logs."""

from __future__ import annotations

import logging
from typing import Any


class Log:
    """Events with fields, on the standard library's logging."""

    def __init__(self, name: str) -> None:
        self._log = logging.getLogger(name)

    def _event(self, level: int, event: str, exc_info: Any = None, **fields: Any) -> None:
        if self._log.isEnabledFor(level):
            text = " ".join([event, *(f"{name}={value}" for name, value in fields.items())])
            self._log.log(level, text, exc_info=exc_info)

    def debug(self, event: str, **fields: Any) -> None:
        self._event(logging.DEBUG, event, **fields)

    def info(self, event: str, **fields: Any) -> None:
        self._event(logging.INFO, event, **fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._event(logging.WARNING, event, **fields)

    def error(self, event: str, **fields: Any) -> None:
        self._event(logging.ERROR, event, **fields)


def get_log(name: str) -> Log:
    return Log(name)
