"""Dialing for the psycopg 3 adapters: psycopg's own way, with a deadline, and with the server's SQLSTATE.

psycopg counts the time for one host in whole seconds, and knows no SQLSTATE when the server refuses. libpq
has it, but gives it only as a part of a verbose message, so the message is asked for that way. It refuses to
read the words of a message, which depend on the server's language: without libpq's help a refusal has no
SQLSTATE, and counts as a failure of the destination, which is tried again.
"""

import ctypes
import re
from collections.abc import Callable, Generator
from contextvars import ContextVar
from importlib import import_module
from time import monotonic
from typing import Any

from cenote.errors import MissingDependency

try:
    import psycopg
except ImportError as missing:
    raise MissingDependency('psycopg is not installed: pip install "cenote[psycopg]"') from missing

from psycopg import errors, pq, waiting

Waits = Generator[Any, Any, Any]  # of psycopg's kind: yields what it waits for, is sent what is ready

dial_until: ContextVar[float] = ContextVar("dial_until")  # psycopg's `connect` has no place for it


def _find_verbosity() -> Callable[[Any, int], Any] | None:
    """libpq's PQsetErrorVerbosity, which psycopg does not offer, from the very library that psycopg uses."""
    try:
        if pq.__impl__ == "python":
            library = import_module("psycopg.pq._pq_ctypes").pq
        else:  # a look-up in an extension module also searches the libraries it is linked to
            library = ctypes.CDLL(str(import_module(f"psycopg_{pq.__impl__}.pq").__file__))
        function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
        return function(("PQsetErrorVerbosity", library))
    except (ImportError, OSError, AttributeError):
        return None


_set_verbosity = _find_verbosity()
_DEFAULT, _VERBOSE = 1, 2  # libpq's PGVerbosity
_STATE = re.compile(r":  ([0-9A-Z]{5}): ")


def dial(conninfo: str, deadline: float) -> Waits:
    """Open a libpq connection; the same loop as in psycopg.generators.

    :raises psycopg.errors.ConnectionTimeout: at the deadline
    :raises psycopg.OperationalError: refused; `refused` finds the SQLSTATE in it
    """
    if monotonic() >= deadline:
        raise errors.ConnectionTimeout("connection timeout expired")
    pgconn: Any = pq.PGconn.connect_start(conninfo.encode())
    if _set_verbosity is not None:
        _set_verbosity(pgconn.pgconn_ptr, _VERBOSE)
    while pgconn.status != pq.ConnStatus.BAD:
        status = pgconn.connect_poll()
        if status == pq.PollingStatus.OK:
            break
        if status == pq.PollingStatus.FAILED:
            raise _dial_error(pgconn)
        wait = waiting.Wait.R if status == pq.PollingStatus.READING else waiting.Wait.W
        ready = None
        while not ready:
            if monotonic() >= deadline:
                pgconn.finish()
                raise errors.ConnectionTimeout("connection timeout expired")
            ready = yield pgconn.socket, wait
    else:
        raise _dial_error(pgconn)
    if _set_verbosity is not None:
        _set_verbosity(pgconn.pgconn_ptr, _DEFAULT)
    pgconn.nonblocking = 1
    return pgconn


def _dial_error(pgconn: Any) -> psycopg.OperationalError:
    message = pgconn.get_error_message()
    pgconn.finish()
    return psycopg.OperationalError(f"connection failed: {message}")


def refused(error: psycopg.Error) -> psycopg.Error:
    """An error of psycopg's `connect`, with the server's SQLSTATE, if it gave one, and marked as a dial's.

    Of several hosts the last one's word counts; psycopg puts its message first, and then all of them."""
    states = _STATE.findall(str(error).partition("\nMultiple connection attempts failed")[0])
    if states:
        error.sqlstate = states[-1]
    error.__dict__["cenote_dial"] = True
    return error
