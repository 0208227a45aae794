"""Who holds what, and why nothing is free: the report behind an acquire timeout.

Stacks are taken when somebody asks, never before: of a thread through the interpreter's frames, of a
suspended task by walking the coroutines it awaits. Reads only; takes no lock and asks no server.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from cenote.pool.drivers.base import IN_TRANSACTION
from cenote.pool.link import Link

FRAMES_SHOWN = 6
HOLDERS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Holder:
    """One lease, as it is now. Times in seconds."""

    age_s: float
    name: str
    site: str
    in_transaction: bool
    in_query: bool
    in_query_s: float
    idle_s: float
    last_verb: str
    stack: tuple[str, ...]

    def __str__(self) -> str:
        doing = "in query" if self.in_query else "idle"
        where = ", in transaction" if self.in_transaction else ""
        verb = f", last {self.last_verb}" if self.last_verb else ", no statement yet"
        head = (
            f"  - {self.age_s:.2f} s by {self.name}: {doing}{where}{verb}"
            f" (in query {self.in_query_s:.2f} s, idle {self.idle_s:.2f} s), acquired at {self.site}"
        )
        return "\n".join([head, *(f"      {line}" for line in self.stack[-FRAMES_SHOWN:])])


def describe(link: Link, driver: Any, now: float) -> Holder:
    """The lease of `link` as it is now."""
    session = link.session
    started = session.query_since_s
    age = max(0.0, now - link.slot.since)
    in_query_s = min(age, session.in_query_s + (now - started if started else 0.0))
    conn = link.ref()
    try:
        in_transaction = conn is not None and driver.condition(conn) == IN_TRANSACTION
    except Exception:  # a report must not fail on a connection that is just breaking
        in_transaction = False
    name, stack = _whereabouts(link.holder)
    return Holder(
        age_s=age,
        name=name,
        site=link.site(),
        in_transaction=in_transaction,
        in_query=bool(started),
        in_query_s=in_query_s,
        idle_s=age - in_query_s,
        last_verb=_verb(session.last_sql),
        stack=stack,
    )


def cause(
    holders: Sequence[Holder], *, limit: int, connecting: int, cleaning: int, down: BaseException | None
) -> str:
    """One sentence: which of the known causes keeps connections from being free.

    cleaning: connections being reset, checked or closed; without holders there need be none, when every lease
        is just between two hands
    """
    if down is not None:
        return f"The database cannot be reached: {first_line(down)}"
    if not holders and connecting:
        return f"{connecting} of {limit} connections are still being dialed: raise acquire_timeout or min_size."
    if not holders and cleaning:
        return "No lease is out: connections are being reset, checked or closed; see the pool's log."
    busy = [holder for holder in holders if holder.in_query or holder.in_query_s > holder.idle_s]
    idle = len(holders) - len(busy)
    if max((holder.age_s for holder in holders), default=0.0) < 0.1:
        return "Leases are short, but more callers arrive than connections can serve: raise max_size or shed load."
    if idle * 2 >= len(holders):
        return (
            f"{idle} of {len(holders)} leases are idle in their holder: "
            "shorten what runs between acquire and release."
        )
    return f"{len(busy)} of {len(holders)} leases are in queries: make the queries shorter, or raise max_size."


def first_line(error: BaseException) -> str:
    try:
        text = str(error).strip()
    except Exception:  # somebody else's class; a message must not cost a connection
        text = ""
    return text.splitlines()[0] if text else type(error).__name__


def _verb(sql: Any) -> str:
    words = str(sql).split(None, 1)
    return words[0].upper()[:20] if words else ""


def _whereabouts(holder: Any) -> tuple[str, tuple[str, ...]]:
    if holder is None:
        return "unknown", ()
    if isinstance(holder, weakref.ref):
        task = holder()
        return ("ended task", ()) if task is None else (f'task "{task.get_name()}"', _task_stack(task))
    name = next((t.name for t in threading.enumerate() if t.ident == holder), "ended thread")
    frame = sys._current_frames().get(holder)
    return f'thread "{name}"', _frames(frame)


def _frames(frame: FrameType | None) -> tuple[str, ...]:
    if frame is None:
        return ()
    stack = traceback.extract_stack(frame, limit=40)
    return tuple(f"{entry.filename}:{entry.lineno} in {entry.name}: {entry.line}" for entry in stack)


def _task_stack(task: asyncio.Task[Any]) -> tuple[str, ...]:
    """From the task's outermost coroutine to what it awaits now."""
    if task.done():
        return ("(the task has ended)",)
    lines: list[str] = []
    awaited: Any = task.get_coro()
    while awaited is not None and len(lines) < 40:
        frame = (
            getattr(awaited, "cr_frame", None)
            or getattr(awaited, "gi_frame", None)
            or getattr(awaited, "ag_frame", None)
        )
        if frame is None:
            lines.append(f"(waits for {type(awaited).__name__})")
            break
        lines.extend(_frames(frame)[-1:])
        awaited = (
            getattr(awaited, "cr_await", None)
            or getattr(awaited, "gi_yieldfrom", None)
            or getattr(awaited, "ag_await", None)
        )
    return tuple(lines)
