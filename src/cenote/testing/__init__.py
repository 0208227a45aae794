"""Helpers for tests of programs that use Cenote, and for Cenote's own: virtual time, a scripted driver,
exhaustive interleaving. Nothing here is imported by the library itself. `cenote.testing.postgres` has
private PostgreSQL servers; it is a module of its own because it needs the embedded server's extra.
"""

from cenote.testing.clock import Stuck, VirtualClock, VirtualLoop, run
from cenote.testing.driver import AsyncScriptedDriver, ScriptedDriver
from cenote.testing.interleave import Plan, Play, Report, ScheduleFailed, explore, replay
from cenote.testing.scripted import (
    AsyncScriptedConnection,
    Call,
    Hold,
    ScriptedConnection,
    ScriptedError,
    ScriptedServer,
    ServerSession,
)

__all__ = [
    "AsyncScriptedConnection",
    "AsyncScriptedDriver",
    "Call",
    "Hold",
    "Plan",
    "Play",
    "Report",
    "ScheduleFailed",
    "ScriptedConnection",
    "ScriptedDriver",
    "ScriptedError",
    "ScriptedServer",
    "ServerSession",
    "Stuck",
    "VirtualClock",
    "VirtualLoop",
    "explore",
    "replay",
    "run",
]
