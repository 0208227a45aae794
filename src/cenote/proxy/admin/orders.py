"""The commands of the console that change something: how each is written, what it does, and its page of help.

What they do is done by `operations.py` and `reload.py`; here a text becomes a call. Nothing runs while a text is
only prepared or described.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from cenote.proxy import operations
from cenote.proxy.admin.refusal import Refusal
from cenote.proxy.admin.table import Row
from cenote.proxy.admin.values import Column
from cenote.proxy.operations import DRAIN_S, OperationError, Scope
from cenote.proxy.reload import ReloadError, reload

#: Carries an order out for a console; a future where that takes a while. Its result is the rows, if there are any.
Act = Callable[[Any], "asyncio.Future[Iterable[Row] | None] | None"]

_NAME = r'(?:"((?:[^"]|"")+)"|([^\s/";]+))'
_SCOPE = rf"{_NAME}(?:/{_NAME})?"


@dataclass(frozen=True, slots=True)
class Order:
    """One command.

    usage: how it is written; text: what it does, in a sentence; details: what else to know
    read: what its arguments ask for; None: they make no sense
    """

    name: str
    usage: str
    text: str
    details: str
    read: Callable[[str], Act | None]
    columns: tuple[Column, ...] = ()

    def act(self, arguments: str) -> Act:
        """What to do.

        :raises Refusal: the arguments make no sense
        """
        found = self.read(arguments)
        if found is None:
            raise Refusal(
                "42601", f"cenote: {self.name} is written {self.usage}", hint=f"HELP {self.name} says more"
            )
        return found


def refusal_of(error: Exception) -> Refusal:
    """What the console says of an order that failed."""
    if isinstance(error, OperationError):
        return Refusal(error.sqlstate, f"cenote: {error.text}", hint="")
    if isinstance(error, ReloadError):
        text = "cenote: the configuration was not taken, and nothing has changed"
        return Refusal("F0000", text, hint="", detail="\n".join(error.problems))
    raise error


# -- arguments ----------------------------------------------------------------------------------------------


def _unquoted(quoted: str | None, plain: str | None) -> str | None:
    return quoted.replace('""', '"') if quoted is not None else plain


def _scope(found: re.Match[str]) -> Scope:
    return Scope(_unquoted(found[1], found[2]), _unquoted(found[3], found[4]))


def _for_scope(run: Callable[[Any, Scope], Any]) -> Callable[[str], Act | None]:
    """`run(console, scope)`, with nothing or a database or a pool as argument."""

    def read(arguments: str) -> Act | None:
        found = re.fullmatch(rf"(?:{_SCOPE})?", arguments)
        return None if found is None else lambda console: run(console, _scope(found))

    return read


# -- what they do -------------------------------------------------------------------------------------------


def _pause(console: Any, scope: Scope) -> Any:
    waits = operations.holders(console.daemon, scope)
    if waits:
        console.notice(f"cenote: waiting: {waits}")
    return operations.pause(console.daemon, scope)


def _drain(arguments: str) -> Act | None:
    found = re.fullmatch(
        rf"(?:(?!(?i:timeout)\b){_SCOPE})?\s*(?:(?i:timeout)\s+(\d{{1,6}}(?:\.\d{{1,3}})?))?", arguments
    )
    if found is None:
        return None
    timeout = float(found[5]) if found[5] is not None else DRAIN_S
    return lambda console: operations.drain(console.daemon, _scope(found), timeout)


def _kill(arguments: str) -> Act | None:
    if re.fullmatch(r"\d{1,10}", arguments):
        return lambda console: operations.kill(console.daemon, int(arguments))
    found = re.fullmatch(rf"(?i:pool)\s+{_SCOPE}", arguments)
    if found is None:
        return None
    scope = Scope(_unquoted(found[1], found[2]), _unquoted(found[3], found[4]))

    def run(console: Any) -> None:
        number = operations.kill_pool(console.daemon, scope)
        console.notice(f"cenote: {number} client{'' if number == 1 else 's'} of {scope} sent away")

    return run


def _reload(arguments: str) -> Act | None:
    async def run(daemon: Any) -> list[Row]:
        changes = await reload(daemon)
        return [*((change, True) for change in changes.applied), *((text, False) for text in changes.restart)]

    return None if arguments else lambda console: asyncio.ensure_future(run(console.daemon))


_ENDS = {
    "": operations.SHUTDOWN,
    "wait": operations.SHUTDOWN_WAIT,
    "immediate": operations.SHUTDOWN_IMMEDIATE,
}


def _shutdown(arguments: str) -> Act | None:
    how = _ENDS.get(arguments.lower())
    return None if how is None else lambda console: operations.shutdown(console.daemon, how)


ORDERS = (
    Order(
        "PAUSE",
        "PAUSE [database[/user]]",
        "Lets no transaction begin, and answers when the running ones have ended and their server connections "
        "are closed.",
        "Clients are not refused: who asks stands in line until RESUME, for as long as its `acquire_timeout` lets "
        "it; so does who logs in. Pinned clients keep their server connection (in session mode, all do), and "
        "PAUSE waits until they leave; a notice says who they are. If it is cancelled, or its connection "
        "ends before it is done, what it paused runs again.",
        _for_scope(_pause),
    ),
    Order(
        "RESUME",
        "RESUME [database[/user]]",
        "Ends PAUSE and DRAIN: who stands in line is served.",
        "Where nothing is paused or drained it does nothing.",
        _for_scope(lambda console, scope: operations.resume(console.daemon, scope)),
    ),
    Order(
        "DRAIN",
        "DRAIN [database[/user]] [TIMEOUT seconds]",
        "Refuses new transactions with 57P01, lets running ones end, and serves those that stand in line already, "
        "for 30 s or as long as TIMEOUT says.",
        "It answers at once: SHOW POOLS says when nothing is leased any more. Nobody is disconnected before it "
        "asks for something; RESUME ends it.",
        _drain,
    ),
    Order(
        "RECONNECT",
        "RECONNECT [database[/user]]",
        "Closes every server connection that was opened before now: idle ones at once, others when they come "
        "back.",
        "Clients notice nothing. It answers at once; `age_s` in SHOW SERVERS says which are old. Pinned clients "
        "keep theirs until they leave.",
        _for_scope(lambda console, scope: operations.reconnect(console.daemon, scope)),
    ),
    Order(
        "KILL",
        "KILL pid | KILL POOL database[/user]",
        "Ends a client, or all clients of a database or a pool, with FATAL 57P01, and cancels what they run.",
        "The pid is the client's, as in SHOW CLIENTS. KILL POOL ends replication connections "
        "too, and closes the pool's server connections. It keeps nobody from coming back, but PAUSE and DRAIN do.",
        _kill,
    ),
    Order(
        "RELOAD",
        "RELOAD",
        "Reads the configuration file again, with its certificates, users and rules; a row for each change.",
        "With any problem nothing is applied, and the error names all of them. Nobody is disconnected, but for "
        "the clients of databases that are gone from the file: they finish their transactions. Where host, role, "
        "password or `init_query` of a database change, its old server connections are closed when they come "
        "back. A row with `applied` false takes a restart. The signal SIGHUP does the same, and the log says what "
        "came of it. Options of the command line still win over the file.",
        _reload,
        (
            Column("change", "text", "the key, or in words what takes a restart"),
            Column("applied", "bool", "it holds now"),
        ),
    ),
    Order(
        "SHUTDOWN",
        "SHUTDOWN [WAIT | IMMEDIATE]",
        "Stops the daemon as Ctrl-C does: nobody comes in, transactions may end for 30 s, then all is closed.",
        "WAIT: for as long as the transactions take. IMMEDIATE, or any SHUTDOWN after the first: at once.",
        _shutdown,
    ),
)
