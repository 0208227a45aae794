"""Every exception Cenote raises, on one screen.

The tree answers "whose fault": `ConfigError` and `MisuseError` are the caller's, `AcquireRefused` is the
pool saying no with numbers, `ConnectFailed` is the server's. Each class carries a stable `code`, which is
an anchor in docs/errors.md, and puts it at the end of its message. Errors of the driver pass unchanged.
"""

from collections.abc import Sequence
from typing import Any


class CenoteError(Exception):
    """Base of all errors of Cenote. `pool` is the pool's name ("" where there is none)."""

    code = "P0000"

    def __init__(self, message: str, *, pool: str = "") -> None:
        self.pool = pool
        where = f'pool "{pool}": ' if pool else ""
        super().__init__(f"{where}{message} [{self.code}]")

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.args), self.__dict__


def _again(kind: type[CenoteError], args: tuple[Any, ...]) -> CenoteError:
    """A pickled or copied error: its message is whole, `__init__` would add to it once more."""
    error = kind.__new__(kind)
    error.args = args
    return error


class ConfigError(CenoteError, ValueError):
    """Options that cannot be used. `problems` lists all of them, not only the first."""

    code = "P1001"

    def __init__(self, problems: Sequence[str], *, pool: str = "") -> None:
        self.problems = tuple(problems)
        shown = problems[0] if len(problems) == 1 else "".join(f"\n  - {text}" for text in problems)
        super().__init__(f"cannot use this configuration: {shown}", pool=pool)


class MissingDependency(CenoteError, ImportError):
    """An optional package is not installed; the message says which extra brings it."""

    code = "P1002"


class EmbeddedError(CenoteError):
    """The embedded PostgreSQL could not be started, stopped or reached."""

    code = "P1003"


class ProtocolError(CenoteError):
    """The other end sent what the PostgreSQL protocol does not allow. Its connection is closed."""

    code = "P1004"


class TargetUnusable(CenoteError):
    """An instrument cannot measure this server: unreachable, log-in refused, too few free connections, gone."""

    code = "P1005"


class AcquireRefused(CenoteError):
    """An acquire was refused. `reason` is a word of `cenote.reasons.Refused`; subclasses name each."""

    code = "P2000"
    reason = ""


class QueueFull(AcquireRefused):
    """`max_waiting` callers already wait."""

    code = "P2001"
    reason = "queue_full"


class Shed(AcquireRefused):
    """CoDel refused this caller because the queue has been standing for too long."""

    code = "P2002"
    reason = "shed"


class AcquireTimeout(AcquireRefused, TimeoutError):
    """No connection within `acquire_timeout`. `holders` describes each lease, `cause` is one sentence."""

    code = "P2003"
    reason = "timeout"

    def __init__(self, message: str, *, pool: str = "", cause: str = "", holders: Sequence[object] = ()) -> None:
        self.cause = cause
        self.holders = tuple(holders)
        super().__init__(message, pool=pool)
        self.args = (self.args[0] + "".join(f"\n{holder}" for holder in holders),)


class PoolDraining(AcquireRefused):
    """The pool is draining and takes no new leases; `resume()` ends that."""

    code = "P2004"
    reason = "draining"


class PoolClosed(AcquireRefused):
    """The pool is closed for good."""

    code = "P2005"
    reason = "closed"


class ConnectFailed(AcquireRefused):
    """The server refuses for good (wrong password, no such database ...). `__cause__` is the driver's error."""

    code = "P2006"
    reason = "connect_failed"


class NestedAcquireDeadlock(AcquireRefused):
    """Every connection is held by somebody who waits for another one of the same pool."""

    code = "P2007"
    reason = "deadlock"


class NotReady(CenoteError, TimeoutError):
    """`wait_ready` ended before the pool had its connections; the message carries the last dial error."""

    code = "P2008"


class MisuseError(CenoteError, RuntimeError):
    """The pool was used in a way that cannot work."""

    code = "P3000"


class NotLeased(MisuseError):
    """This connection is not on loan from this pool: released before, or another pool's."""

    code = "P3001"


class WrongEventLoop(MisuseError):
    """An AsyncPool belongs to the event loop that first used it."""

    code = "P3002"


class LeasesOutstanding(MisuseError, AssertionError):
    """`assert_all_returned` found leases still out."""

    code = "P3003"
    holders: tuple[object, ...] = ()


class CenoteWarning(UserWarning):
    """Base of what Cenote warns about."""


class NestedAcquireWarning(CenoteWarning):
    """A holder of a connection waits for a second one of the same pool: enough of these at once deadlock."""


class LeakWarning(CenoteWarning, ResourceWarning):
    """A lease was dropped without being given back, or is held for longer than `leak_after`."""
