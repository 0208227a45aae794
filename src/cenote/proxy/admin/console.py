"""Stand-in until the console is written."""

from __future__ import annotations

from typing import Any


class Console:
    """Nothing yet."""

    closed = False

    def __init__(self, daemon: Any) -> None:
        self.daemon = daemon

    def greeting(self) -> bytes:
        return b""

    def receive(self, data: bytes) -> bytes:
        return b""
