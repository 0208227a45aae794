"""The virtual database `cenote`: PostgreSQL's protocol on one side, the tables of `tables.py` on the other.

Bytes in, bytes out: the simple and the extended query protocol, prepared statements and portals with row limits,
text and binary results, transactions in name. What a text means is decided in `commands.py`. Everything a client
can make it keep is bounded, and a long answer may be given in portions, so that nobody else waits for it. An order
that takes a while is awaited, and can be cancelled. It refuses parameters, COPY and function calls.

Source: PostgreSQL documentation, "Message Flow".
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cenote.errors import ProtocolError
from cenote.proxy.admin import values
from cenote.proxy.admin.commands import PARAMETERS, Command, understand
from cenote.proxy.admin.orders import refusal_of
from cenote.proxy.admin.refusal import Refusal
from cenote.proxy.admin.table import Row
from cenote.proxy.admin.tables import COMMANDS
from cenote.proxy.log import get_log
from cenote.proxy.operations import OperationError
from cenote.proxy.reload import ReloadError
from cenote.wire import messages

log = get_log("cenote.proxy.console")

_KINDS = b"QPBDECSHXFdcf"
_IN_EXTENDED = b"PBDECH"
_MAX_FRAME = 65_536
_MAX_KEPT = 200  # prepared statements, and portals
_MAX_ANSWER = 64 * 1024 * 1024  # to what came in one piece
_MAX_AHEAD = 1024 * 1024  # sent while the answer to what came before is not finished
_DONE = object()
_SUSPENDED = messages.message(b"s")


@dataclass(slots=True)
class _Statement:
    """A prepared one. `command` None: the empty text."""

    command: Command | None
    parameters: tuple[int, ...]


@dataclass(slots=True)
class _Portal:
    """A bound one. `rows` is what is left of its result once it has begun, `tag` how that ends."""

    command: Command | None
    formats: tuple[int, ...]
    rows: Iterator[Row] | None = None
    tag: str = ""


class Console:
    """One client of the console, after its log-in. On the event loop.

    closed: it has said that it ends
    unfinished: there is more to answer: `receive(b"")` goes on, at once or when `awaited` is done

    :param client: whose it is, so that the log can say who gave an order; None: nobody's (tests)
    :param portion: rows after which `receive` returns for a moment; None: all at once (10,000 rows take 0.1 s)
    """

    def __init__(self, daemon: Any, portion: int | None = None, client: Any = None) -> None:
        self.daemon = daemon
        self._portion = portion
        self._client = client
        self.closed = False
        self.awaited: asyncio.Future[Iterable[Row] | None] | None = None
        self._part = b""
        self._status = b"I"
        self._skipping = False  # after an error in an extended batch, until its Sync
        self._statements: dict[bytes, _Statement] = {}
        self._portals: dict[bytes, _Portal] = {}
        self._out: list[bytes] = []
        self._answered = 0
        self._work: Iterator[None] | None = None  # the message that is being answered

    @property
    def unfinished(self) -> bool:
        return self._work is not None

    def cancel(self) -> bool:
        """Cancel the order that is awaited; whether there is one."""
        return self.awaited is not None and self.awaited.cancel()

    def notice(self, text: str) -> None:
        """Say something beside the answer."""
        self._out.append(messages.notice("NOTICE", "00000", text))

    def greeting(self) -> bytes:
        """What it says of itself at log-in: ParameterStatus messages."""
        return b"".join(messages.parameter_status(name, value) for name, value in PARAMETERS.items())

    def receive(self, data: bytes) -> bytes:
        """Take what the client has sent, in whatever pieces; return what to answer.

        :raises ProtocolError: it is malformed, or asks for too much at once; the connection is to be closed
        """
        self._part += data
        if self._work is not None and len(self._part) > _MAX_AHEAD:
            raise ProtocolError("too much was asked at once; read the answers first")
        self._out = []
        at = 0
        while not self.closed:
            if self._work is None:
                at, self._work = self._next(at)
                if self._work is None:
                    break
            size = len(self._out)
            paused = next(self._work, _DONE) is not _DONE
            self._answered += sum(map(len, self._out[size:]))
            if self._answered > _MAX_ANSWER:
                raise ProtocolError("too much was asked at once; read the answers first")
            if paused:
                break
            self._work = None
        self._answered = 0
        self._part = b"" if self.closed else self._part[at:]
        return b"".join(self._out)

    def _next(self, at: int) -> tuple[int, Iterator[None] | None]:
        """The work of the next message, if it is there in whole, and where the one after it begins."""
        data = self._part
        if len(data) - at < 5:
            return at, None
        kind, length = data[at], int.from_bytes(data[at + 1 : at + 5], "big")
        if kind not in _KINDS:
            raise ProtocolError(f"invalid frontend message type {kind}")
        if not 4 <= length <= _MAX_FRAME:
            raise ProtocolError(f"a message of {length} bytes; the console takes {_MAX_FRAME}")
        if len(data) - at < length + 1:
            return at, None
        return at + 1 + length, self._message(kind, data[at + 5 : at + 1 + length])

    # -- messages ---------------------------------------------------------------------------------------------

    def _message(self, kind: int, body: bytes) -> Iterator[None]:
        """Answer a message; it stops for a moment wherever a portion of rows is full."""
        letter = chr(kind)
        if letter == "X":
            self.closed = True
        elif letter == "S":
            _Reader(body).end()
            self._skipping = False
            if self._status == b"I":
                self._portals.clear()
            self._ready()
        elif self._skipping:
            return
        elif letter == "Q":
            yield from self._query(body)
        elif letter == "F":
            self._say_error(Refusal("0A000", "cenote: the console calls no functions"))
            self._ready()
        elif kind in _IN_EXTENDED:
            try:
                yield from self._extended(letter, _Reader(body))
            except Refusal as refusal:
                self._say_error(refusal)
                self._skipping = True
        # What is left are the messages of COPY, which a server ignores outside of one.

    def _extended(self, letter: str, body: _Reader) -> Iterator[None]:
        if letter == "P":
            self._parse(body)
        elif letter == "B":
            self._bind(body)
        elif letter == "D":
            self._describe(body)
        elif letter == "E":
            yield from self._execute(body)
        elif letter == "C":
            kept: dict[bytes, Any] = self._statements if body.byte() == b"S" else self._portals
            kept.pop(body.name(), None)
            body.end()
            self._out.append(messages.CLOSE_COMPLETE)

    # -- simple -----------------------------------------------------------------------------------------------

    def _query(self, body: bytes) -> Iterator[None]:
        self._portals.pop(b"", None)
        self._statements.pop(b"", None)
        reader = _Reader(body)
        text = reader.text()
        reader.end()
        try:
            commands = understand(text, self.daemon)
            if not commands:
                self._out.append(messages.EMPTY_QUERY)
            for command in commands:
                self._allowed(command)
                formats = (values.TEXT,) * len(command.columns)
                if command.columns:
                    self._out.append(values.description(command.columns, formats))
                yield from self._finish(_Portal(command, formats), 0)
        except Refusal as refusal:
            self._say_error(refusal)
        self._ready()

    # -- extended ---------------------------------------------------------------------------------------------

    def _parse(self, body: _Reader) -> None:
        name, text = body.name(), body.text()
        types = tuple(body.number("!I") for _ in range(body.number("!H")))
        body.end()
        commands = understand(text, self.daemon)
        if len(commands) > 1:
            raise Refusal("42601", "cannot insert multiple commands into a prepared statement", "")
        command = commands[0] if commands else None
        if types and not (command is not None and command.parameters):
            raise _no_parameters()
        if name and name in self._statements:
            raise Refusal("42P05", f'prepared statement "{_shown(name)}" already exists', "")
        _bounded(self._statements, name, "prepared statements")
        self._statements[name] = _Statement(command, types)
        self._out.append(messages.PARSE_COMPLETE)

    def _bind(self, body: _Reader) -> None:
        portal, statement = body.name(), body.name()
        for _ in range(body.number("!H")):
            body.number("!H")
        count = body.number("!H")
        for _ in range(count):
            body.skip(body.number("!i"))
        formats = tuple(body.number("!H") for _ in range(body.number("!H")))
        body.end()
        command = self._statement(statement).command
        if count and not (command is not None and command.parameters):
            raise _no_parameters()
        columns = len(command.columns) if command is not None else 0
        if any(form not in (values.TEXT, values.BINARY) for form in formats):
            raise Refusal("22023", f"unsupported format code: {max(formats)}", "")
        if len(formats) > 1 and len(formats) != columns:
            text = f"bind message has {len(formats)} result formats but query has {columns} columns"
            raise Refusal("08P01", text, "")
        if len(formats) <= 1:
            formats = (formats or (values.TEXT,)) * columns
        if portal and portal in self._portals:
            raise Refusal("42P03", f'cursor "{_shown(portal)}" already exists', "")
        _bounded(self._portals, portal, "portals")
        self._portals[portal] = _Portal(command, formats)
        self._out.append(messages.BIND_COMPLETE)

    def _describe(self, body: _Reader) -> None:
        kind, name = body.byte(), body.name()
        body.end()
        if kind == b"S":
            statement = self._statement(name)
            command = statement.command
            types = b"".join(struct.pack("!I", oid) for oid in statement.parameters)
            self._out.append(messages.message(b"t", struct.pack("!H", len(statement.parameters)) + types))
            formats = (values.TEXT,) * (len(command.columns) if command is not None else 0)
        else:
            portal = self._portal(name)
            command, formats = portal.command, portal.formats
        if command is None or not command.columns:
            self._out.append(messages.NO_DATA)
        else:
            self._out.append(values.description(command.columns, formats))

    def _execute(self, body: _Reader) -> Iterator[None]:
        name, limit = body.name(), body.number("!i")
        body.end()
        portal = self._portal(name)
        if portal.command is None:
            self._out.append(messages.EMPTY_QUERY)
            return
        if portal.rows is None:
            self._allowed(portal.command)
        yield from self._finish(portal, limit)

    def _statement(self, name: bytes) -> _Statement:
        statement = self._statements.get(name)
        if statement is None:
            raise Refusal("26000", f'prepared statement "{_shown(name)}" does not exist', "")
        return statement

    def _portal(self, name: bytes) -> _Portal:
        portal = self._portals.get(name)
        if portal is None:
            raise Refusal("34000", f'portal "{_shown(name)}" does not exist', "")
        return portal

    # -- results ----------------------------------------------------------------------------------------------

    def _finish(self, portal: _Portal, limit: int) -> Iterator[None]:
        """Send rows of a command, at most `limit` (0: all), and its end if that is it."""
        command = portal.command
        assert command is not None
        if portal.rows is None:
            portal.tag = self._turn(command)
            portal.rows = iter(command.rows() if command.act is None else (yield from self._carry_out(command)))
        sent = 0
        for row in portal.rows:
            self._out.append(values.row(command.columns, portal.formats, row))
            sent += 1
            if sent == limit:
                self._out.append(_SUSPENDED)
                return
            if self._portion is not None and sent % self._portion == 0:
                yield
        tag = f"SELECT {sent}" if command.tag == "SELECT" else portal.tag
        self._out.append(messages.command_complete(tag))

    def _carry_out(self, command: Command) -> Generator[None, None, Iterable[Row]]:
        """Do what an order says; it stops for a moment as long as that takes. Returns its rows.

        :raises Refusal: it was cancelled, or failed
        """
        assert command.act is not None
        client = self._client
        if client is not None:
            log.info("operator", order=command.order, user=client.login.user, client=client.address)
        try:
            awaited = command.act(self)
            if awaited is None:
                return ()
            self.awaited = awaited
            while not awaited.done():
                yield
            if awaited.cancelled():
                raise Refusal("57014", "canceling statement due to user request", "")
            return awaited.result() or ()
        except (OperationError, ReloadError) as error:
            raise refusal_of(error) from None
        finally:
            self.awaited = None

    def _allowed(self, command: Command) -> None:
        client = self._client
        if client is not None and client.login.user not in self.daemon.config.admin_users:
            text = f'permission denied: "{client.login.user}" is not in admin_users any more'
            raise Refusal("42501", f"cenote: {text}", "")
        if self._status == b"E" and command.turn not in ("commit", "rollback", "back_to"):
            text = "current transaction is aborted, commands ignored until end of transaction block"
            raise Refusal("25P02", text, "")

    def _turn(self, command: Command) -> str:
        """What a command does to the session, and the tag that says so. Nothing is there to be committed, but
        drivers look at the status."""
        failed = self._status == b"E"
        if command.turn == "begin":
            self._status = b"T"
        elif command.turn in ("commit", "rollback"):
            self._status = b"I"
        elif command.turn == "back_to" and failed:
            self._status = b"T"
        if command.forgets == "*":
            self._statements.clear()
        elif command.forgets:
            self._statements.pop(command.forgets.encode(), None)
        return "ROLLBACK" if command.turn == "commit" and failed else command.tag

    def _say_error(self, refusal: Refusal) -> None:
        if self._status == b"T":
            self._status = b"E"
        hint = COMMANDS if refusal.hint is None else refusal.hint
        error = messages.error("ERROR", refusal.sqlstate, refusal.text, detail=refusal.detail, hint=hint)
        self._out.append(error)

    def _ready(self) -> None:
        self._out.append(messages.ready(self._status))


class _Reader:
    """The fields of a message, one after the other, and its end.

    :raises ProtocolError: it is shorter or longer than it says
    """

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def byte(self) -> bytes:
        return self._take(1)

    def name(self) -> bytes:
        end = self._body.find(b"\0", self._at)
        if end < 0:
            raise ProtocolError("invalid string in message")
        found = self._body[self._at : end]
        self._at = end + 1
        return found

    def text(self) -> str:
        return self.name().decode("utf-8", "replace")

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def skip(self, count: int) -> None:
        """A value; -1 is NULL."""
        if count < -1:
            raise ProtocolError(f"a parameter of {count} bytes")
        self._take(max(0, count))

    def end(self) -> None:
        if self._at != len(self._body):
            raise ProtocolError("invalid message format")

    def _take(self, count: int) -> bytes:
        found = self._body[self._at : self._at + count]
        if len(found) < count:
            raise ProtocolError("insufficient data left in message")
        self._at += count
        return found


def _no_parameters() -> Refusal:
    return Refusal("0A000", "cenote: the console takes no parameters: write the command out")


def _bounded(kept: dict[bytes, Any], name: bytes, what: str) -> None:
    if len(kept) >= _MAX_KEPT and name not in kept:
        raise Refusal("54000", f"cenote: {_MAX_KEPT} {what} are the most on the console: close some", "")


def _shown(name: bytes) -> str:
    return name.decode("utf-8", "replace")
