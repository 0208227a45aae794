"""Structured logs: events with fields, one line each, on the standard library's logging.

An event is a name of `EVENTS`; numbers, names and reason words are fields. No event is for a single query. Of
events of one kind (same name, pool and reason) the first is written at once and the rest are counted, one line in
ten seconds, so that a storm fills no disk; at level debug every one is written. Passwords are never written,
whatever a caller passes. It opens no file and rotates nothing: lines go to standard error, for whoever runs us.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from time import monotonic
from typing import Any, TextIO

#: Events by name: what has happened, as docs/logs.md has it.
EVENTS: dict[str, str] = {
    "started": "it listens, and the pools known by name have begun to open their warm minimum",
    "metrics_served": "the metrics are there for whoever asks",
    "stopping": "a signal, or SHUTDOWN, asked for the end; clients may finish their transactions",
    "draining": "no new clients and transactions from here on",
    "stopped": "all is closed",
    "operator": "an order was given on the console, and by whom",
    "reloaded": "the configuration was read again: what has changed, and what takes a restart",
    "reload_refused": "the configuration was read again and not taken; nothing has changed",
    "login_refused": "a client may not come in; `reason` is what the metrics count it as",
    "login_failed": "a log-in failed inside Cenote: a bug, please report it",
    "client_protocol_error": "a client sent what the protocol does not allow; its connection is closed",
    "lookup_failed": "auth_query has failed; `reason` query: this user is taken for unknown; unreachable: nobody"
    " can be looked up now",
    "password_file_ignored": "others may read the password file, so it is not used",
    "dial_failed": "a server connection could not be opened; `failure` is what that says about the others",
    "server_notice": "a server, or a login event trigger there, said something when a connection was opened",
    "server_full": "a server had no connection to give; for a minute it is asked for no more than it gives now",
    "server_crowded": "what is ours and what others have there is more than the server has: lower the percentage,"
    " or have the others go through here too",
    "state_leaked": "a session was not what it was taken for: what differs, and what had run; it was closed",
    "pinned": "a client keeps its server connection past the transaction, and why",
    "listener_lost": "the connection that listens for all clients of a pool was lost or given up, and why",
    "listening_again": "another one listens; every listener was told of the gap",
    "listener_refused": "the server does not let the connection of all clients listen; it is tried again",
    "server_protocol_error": "a server sent what the protocol does not allow; that connection is closed",
    "cancel_failed": "a cancel request did not reach the server",
    "no_descriptors": "the process has no descriptor left for a client; nothing is accepted for a moment",
    "task_failed": "a task of a pool failed inside Cenote: a bug, please report it",
}

#: Seconds in which repetitions of a kind become one line.
QUIET_S = 10.0
_MAX_KINDS = 1_000
_MAX_VALUE = 500
# What makes two events of one name different: words from short lists, nothing that a stranger can choose.
_KIND_FIELDS = ("pool", "reason", "failure", "sqlstate", "order", "changed", "problems")
_SECRET_NAMES = re.compile(r"password|passwd|secret|verifier|credential|private_key|token", re.IGNORECASE)
_SECRET_TEXTS = re.compile(r"(?<=://)([^/\s:@]*):[^/\s@]+(?=@)|(?<=password=)('[^']*'|\S+)", re.IGNORECASE)
_BARE = re.compile(r"[A-Za-z0-9_.:/@+*\[\]-]+")


class Damper:
    """Which events are written, and how many of the same kind were not. It knows no clock."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[Any, ...], tuple[float, int]] = {}

    def pass_on(self, kind: tuple[Any, ...], now: float) -> int | None:
        """How many of this kind were swallowed since the last line; None: swallow this one too. O(1)"""
        known = self._kinds.get(kind)
        if known is None:
            if len(self._kinds) >= _MAX_KINDS:
                kind = ("",)  # something in it has too many values: all such are one kind
                known = self._kinds.get(kind)
            if known is None:
                self._kinds[kind] = (now + QUIET_S, 0)
                return 0
        until, swallowed = known
        if now < until:
            self._kinds[kind] = (until, swallowed + 1)
            return None
        self._kinds[kind] = (now + QUIET_S, 0)
        return swallowed

    def overdue(self, now: float) -> list[tuple[tuple[Any, ...], int]]:
        """Kinds whose time is over, with how many were swallowed; they begin anew. O(kinds)"""
        found = []
        for kind, (until, swallowed) in list(self._kinds.items()):
            if now >= until:
                del self._kinds[kind]
                if swallowed:
                    found.append((kind, swallowed))
        return found


class Log:
    """Writes events of one part of Cenote. On any thread.

    :param clock: monotonic seconds
    """

    def __init__(self, name: str, clock: Callable[[], float] = monotonic) -> None:
        self._log = logging.getLogger(name)
        self._clock = clock
        self._damper = Damper()

    def debug(self, event: str, **fields: Any) -> None:
        self._event(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._event(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._event(logging.WARNING, event, fields)

    def error(self, event: str, *, exc_info: BaseException | None = None, **fields: Any) -> None:
        """With the traceback of an exception, if there is one."""
        self._event(logging.ERROR, event, fields, exc_info)

    def flush(self, *, now: float | None = None) -> None:
        """Write what was counted and is overdue; infinite `now` writes all. To be called now and then."""
        for (level, event, *known), swallowed in self._damper.overdue(self._clock() if now is None else now):
            fields = {name: value for name, value in zip(_KIND_FIELDS, known, strict=False) if value is not None}
            self._write(level, event, {**fields, "repeated": swallowed, "in_s": QUIET_S})

    def _event(
        self, level: int, event: str, fields: dict[str, Any], exc_info: BaseException | None = None
    ) -> None:
        if not self._log.isEnabledFor(level):
            return
        if not self._log.isEnabledFor(logging.DEBUG):
            kind = (level, event, *[fields.get(name) for name in _KIND_FIELDS])
            swallowed = self._damper.pass_on(kind, self._clock())
            if swallowed is None:
                return
            if swallowed:
                fields["repeated"] = swallowed
        self._write(level, event, fields, exc_info)

    def _write(
        self, level: int, event: str, fields: dict[str, Any], exc_info: BaseException | None = None
    ) -> None:
        safe = {name: _safe(name, value) for name, value in fields.items() if value is not None}
        text = " ".join([event, *(f"{name}={_quoted(value)}" for name, value in safe.items())])
        # The text is whole for handlers that are not ours, such as an application's own.
        self._log.log(level, "%s", text, exc_info=exc_info, extra={"event": event, "fields": safe})


_LOGS: dict[str, Log] = {}


def get_log(name: str) -> Log:
    """The log of this name: `cenote.proxy`, or below it."""
    return _LOGS.setdefault(name, Log(name))


def flush_logs(*, last: bool = False) -> None:
    """Write what was counted and is overdue, in all logs; `last`: what is not overdue too."""
    for log in list(_LOGS.values()):
        log.flush(now=float("inf") if last else None)


def start_logging(level: str = "info", form: str = "text", stream: TextIO | None = None) -> None:
    """Write Cenote's events to `stream`. Again: replaces what it did before.

    :param level: debug, info, warning or error
    :param form: text (`name=value`) or json (an object a line)
    :param stream: standard error if none is given
    """
    logger = logging.getLogger("cenote")
    for handler in [handler for handler in logger.handlers if isinstance(handler, _Handler)]:
        logger.removeHandler(handler)
    handler = _Handler(stream if stream is not None else sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False


class _Handler(logging.StreamHandler[TextIO]):
    """Ours, to be told from an application's."""


class _Text(logging.Formatter):
    """Time, level, event, fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname.lower()} {_line(record.getMessage())}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    """One object; what was raised is a field of it, so that an event stays a line."""

    def format(self, record: logging.LogRecord) -> str:
        told = {
            **getattr(record, "fields", {}),
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": getattr(record, "event", None) or record.getMessage(),
        }
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        first = {name: told.pop(name) for name in ("time", "level", "logger", "event")}
        return json.dumps({**first, **told})


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _safe(name: str, value: Any) -> Any:
    """The value without secrets and of bounded length; numbers stay numbers."""
    if _SECRET_NAMES.search(name):
        return "***"
    if isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else str(value)
    text = _SECRET_TEXTS.sub(lambda found: f"{found[1]}:***" if found[1] is not None else "***", str(value))
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}..."


def _quoted(value: Any) -> str:
    """As it is, or in quotes with all that could end a line or pass for another field escaped."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text)


def _line(text: str) -> str:
    return text.replace("\r", "\\r").replace("\n", "\\n")


def markdown(events: Iterable[tuple[str, str]] = EVENTS.items()) -> str:
    """The page docs/logs.md."""
    rows = "".join(f"| `{event}` | {text} |\n" for event, text in events)
    return _PAGE + rows


_PAGE = """# The proxy's logs

Generated by `python -m cenote.proxy.log`; change `src/cenote/proxy/log.py` instead.

Lines go to standard error: `log_level` is `debug`, `info`, `warning` or `error`, `log_format` is `text` or `json`.

```
2026-11-21T05:57:11.204Z warning dial_failed pool=orders/app failure=destination sqlstate=08001 repeated=41
```

```json
{"time": "2026-11-21T05:57:11.204Z", "level": "info", "logger": "cenote.proxy", "event": "draining", "clients": 12}
```

Times are UTC; fields that end in `_s` are seconds; a value that is not plain stands in quotes, escaped as in JSON,
so that no name a client chooses can forge a line. Passwords are never written. No query leaves a line: those are
counted ([metrics](metrics.md), [console](console.md)).

Of events of one kind (same event, pool, reason, failure, SQLSTATE and order) the first is written at once, the
others are counted: 10 s later one line of that kind says `repeated=` how many. At level `debug` every one is
written.

| event | what has happened |
| --- | --- |
"""

if __name__ == "__main__":
    sys.stdout.write(markdown())
