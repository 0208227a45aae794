"""What a pool knows of one open connection: the shell's half of a slot (`slot.data`).

While leased the pool holds the connection only weakly: a borrower that drops it is noticed. Who borrowed is
kept as cheaply as possible (a thread id or task, a code object and an offset); names, line numbers and
stacks are looked up only when somebody asks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from sys import _getframe
from types import CodeType
from typing import Any

# Frames of these files are the pool's own, not the borrower's. (Compiled modules have no frames.)
_OWN_FILES = frozenset(str(path) for path in Path(__file__).parent.glob("*.py"))


class Link:
    """One open connection.

    conn: the driver's connection while the pool has it, None while it is lent
    ref: a weak reference to it, or a callable that returns it for drivers without weak references
    holder: of the borrower the thread id, or a weak reference to the asyncio.Task
    code, offset: where it was acquired
    gone: its borrower dropped it
    scoped: lent to a `with` block, so that the borrower is who holds it
    """

    __slots__ = (
        "__weakref__",
        "code",
        "conn",
        "dropped",
        "gone",
        "handle",
        "holder",
        "key",
        "offset",
        "ref",
        "scoped",
        "session",
        "slot",
        "warned",
    )

    def __init__(
        self, slot: Any, conn: Any, session: Any, handle: Any, dropped: Callable[[Link], None] | None
    ) -> None:
        self.slot = slot
        self.conn = conn
        self.session = session
        self.handle = handle
        self.key = id(conn)
        self.holder: Any = None
        self.code: CodeType | None = None
        self.offset = 0
        self.scoped = False
        self.warned = False
        self.gone = False
        self.dropped = dropped
        self.ref: Callable[[], Any] = _Always(conn)
        self.watch(conn)

    def watch(self, conn: Any) -> None:
        """Notice when a borrower drops `conn`.

        One reference serves for the connection's whole life: while the pool has it, it cannot die. Only the
        collector can clear it and the connection come back all the same, from the `finally` of a generator that
        was collected together with it: then it is to be watched anew."""
        self.gone = False
        dropped = self.dropped
        if dropped is None:
            return
        mine = weakref.ref(self)

        def died(_: object) -> None:
            link = mine()
            if link is not None:
                link.gone = True
                dropped(link)

        self.ref = weakref.ref(conn, died)

    def lend_once(self, holder: Any) -> Any:
        """Give the connection away for one statement of the pool's own. The site is not looked up: it costs a
        microsecond right after a round trip, nobody can leak from there, and a live stack tells it anyway."""
        self.code = None
        self.holder = holder
        self.scoped = True
        self.warned = False
        conn = self.conn
        self.conn = None
        return conn

    def lend(self, holder: Any, scoped: bool) -> Any:
        """Note the borrower and give the only strong reference away."""
        frame = _getframe()
        code = frame.f_code
        while code.co_filename in _OWN_FILES and frame.f_back is not None:
            frame = frame.f_back
            code = frame.f_code
        self.code = code
        self.offset = frame.f_lasti
        self.holder = holder
        self.scoped = scoped
        self.warned = False
        conn = self.conn
        self.conn = None
        return conn

    def site(self) -> str:
        """Where it was acquired, as "file:line in function"."""
        if self.code is None:
            return "a one-shot statement"
        return f"{self.code.co_filename}:{_line(self.code, self.offset)} in {self.code.co_qualname}"


class _Always:
    """Stands in for a weak reference where the driver's connections cannot have one."""

    __slots__ = ("conn",)

    def __init__(self, conn: Any) -> None:
        self.conn = conn

    def __call__(self) -> Any:
        return self.conn


def _line(code: CodeType, offset: int) -> int:
    for start, end, line in code.co_lines():
        if start <= offset < end and line is not None:
            return line
    return code.co_firstlineno
