"""A client's prepared statements: what it calls by which name, wherever that has to be prepared.

The client's names are its own. A server connection has each statement under a name that is free there, the
client's whenever possible, so that most messages pass unchanged; what a connection lacks is prepared on it right
before it is needed, and the answer swallowed.
"""

from __future__ import annotations

from typing import Any

from cenote.proxy.prepared import Statement
from cenote.proxy.reading import HARMLESS, read
from cenote.proxy.replies import CLOSE, NAMED_PARSE, NONE, OWN_BRING, OWN_PARSE, SYNTHETIC, SYNTHETIC_CLOSE, Entry
from cenote.proxy.roles import Borrower
from cenote.proxy.server import ServerConnection
from cenote.sql import touch
from cenote.wire import messages

# The same as C sees them.
_OWED_NONE, _OWED_NAMED_PARSE, _OWED_OWN_PARSE = NONE, NAMED_PARSE, OWN_PARSE
_OWED_SYNTHETIC, _OWED_SYNTHETIC_CLOSE, _OWED_OWN_BRING = SYNTHETIC, SYNTHETIC_CLOSE, OWN_BRING
_OWED_CLOSE = CLOSE
_PREPARED = touch.PREPARED
_FAILED = 0x45  # E, as a transaction status


class Named(Borrower):
    """A borrower with prepared statements.

    statements: by the client's names; None until there is one
    unnamed: what its unnamed statement was parsed from, and what that may touch
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool: Any = None
        self.statements: dict[bytes, Statement] | None = None
        self.unnamed_reading: Any = HARMLESS

    def parse_named(self, server: ServerConnection, name: bytes, tail: bytes) -> bool:
        """Parse of a named statement. Whether what is to be sent was sent (or need not be)."""
        if self.statements is None:
            self.statements = {}
        old = self.statements.get(name)
        if old is not None:
            # The server shall say 42P05, or what else is wrong, as it would to a client of its own.
            there = server.known.get(old)
            if there is None:
                old = self.statement_now(server, name, old)
                there = server.known.get(old)
            if there != name:
                if there is not None:
                    server.close_statement(old, there)
                other = server.names.get(name)
                if other is not None:
                    server.close_statement(other, name)
                self.bring(server, name, old)
            server.replies.add(Entry(_OWED_NAMED_PARSE))
            return False
        reading = read(tail[: tail.index(b"\0")])
        statement = self.statement_of(tail, reading)
        self.pool.tick += 1
        statement.used = self.pool.tick
        self.statements[name] = statement
        there = server.known.get(statement)
        if self.settings is not None and name in self.settings.prepared_names:
            pass  # it is taken, by SQL: the server shall say so
        elif there is not None and server.status != _FAILED:
            if server.replies.kind == _OWED_NONE:
                self.write(messages.PARSE_COMPLETE)
            else:
                server.replies.add(Entry(_OWED_SYNTHETIC, statement, name, messages.PARSE_COMPLETE))
            return True
        if there is not None:
            # In a failed transaction a Parse is refused: the server shall say so itself.
            server.close_statement(statement, there)
        there = self.name_there(server, name)
        server.know(statement, there)
        server.replies.add(Entry(_OWED_NAMED_PARSE, statement, name))
        if there == name:
            return False
        server.write(messages.parse(there, tail))
        return True

    def statement_of(self, tail: bytes, reading: Any) -> Statement:
        """What this is as a statement under the settings there are now."""
        if self.apart:
            return Statement(tail, reading, None, True)
        statement: Statement = self.pool.statement(self.settings, tail, reading)
        return statement

    def statement_now(self, server: ServerConnection, name: bytes, statement: Statement) -> Statement:
        """What this statement of the client is on a server that lacks it: it is prepared there under the settings
        there are now, and must not be taken for one prepared under others."""
        means = self.settings.meaning if self.settings is not None else None
        if statement.own or (not self.apart and statement.meaning == means):
            return statement
        return self.renewed(server, name, statement)

    def parse_known(self, data: bytes, at: int, end: int) -> bool:
        """Parse, without a server connection, of what some server has parsed before: answered here.

        A driver that prepares one client's statements while another one's transaction waits for it in the same
        thread would stop both otherwise.
        """
        split = data.find(b"\0", at, end)
        name = data[at:split]
        if split < 0 or (self.statements is not None and name in self.statements):
            return False
        if self.settings is not None and name in self.settings.prepared_names:
            return False
        statement = self.pool.known(self.settings, data[split + 1 : end])
        if statement is None:
            return False
        if self.statements is None:
            self.statements = {}
        self.statements[name] = statement
        self.guessed = statement
        self.write(messages.PARSE_COMPLETE)
        return True

    def name_there(self, server: ServerConnection, name: bytes) -> bytes:
        """A name for one more statement, after making room for it."""
        if len(server.known) >= self.pool.max_prepared:
            oldest = None
            for statement in server.known:
                if oldest is None or statement.used < oldest.used:
                    oldest = statement
            if oldest is not None and oldest.used < server.lease_tick:
                server.close_statement(oldest, server.known[oldest])
        while name in server.names:
            self.pool.tick += 1
            name = b"cenote_%x" % self.pool.tick
        return name

    def bring(self, server: ServerConnection, name: bytes, statement: Statement | None) -> bytes:
        """Prepare on this server what the client prepared elsewhere; the name it has there."""
        if statement is None:
            # Nobody's statement may answer to this name: the server shall say 26000.
            other = server.names.get(name)
            if other is not None:
                server.close_statement(other, name)
            return name
        statement = self.statement_now(server, name, statement)
        known = server.known.get(statement)
        if known is not None:
            return known
        there = self.name_there(server, name)
        server.write(messages.parse(there, statement.tail))
        server.know(statement, there)
        server.replies.add(Entry(_OWED_OWN_PARSE, statement, there))
        return there

    def renewed(self, server: ServerConnection, name: bytes, old: Statement) -> Statement:
        """A statement in place of one whose rows have changed, or that was prepared under other settings."""
        there = server.known.get(old)
        if there is not None:
            server.close_statement(old, there)
        statement = self.statement_of(old.tail, old.reading)
        if self.statements is not None:
            self.statements[name] = statement
        return statement

    def bring_unnamed(self, server: ServerConnection, kind: int = OWN_PARSE) -> None:
        """Give the server the client's unnamed statement, or none."""
        if self.unnamed is None:
            server.close_statement(None, b"")
        else:
            server.write(messages.parse(b"", self.unnamed))
            server.replies.add(Entry(kind))
        server.unnamed = self.unnamed
        server.unnamed_at = server.replies.sent

    def describe(self, server: ServerConnection, name: bytes) -> bool:
        """Describe of a statement. Whether it was sent here, under another name."""
        if not name:
            if server.unnamed is None or server.unnamed is not self.unnamed:
                self.bring_unnamed(server)
            return False
        statement = self.statements.get(name) if self.statements is not None else None
        there = server.known.get(statement) if statement is not None else None
        if there is None:
            there = self.bring(server, name, statement)
        if there == name:
            return False
        server.write(messages.message(b"D", b"S" + there + b"\0"))
        return True

    def take_names(self, server: ServerConnection) -> None:
        """From now on the server knows this client's statements, by the client's names, and nobody else's."""
        mine = self.statements or {}
        inside = server.replies.open
        kind = _OWED_OWN_PARSE if inside else _OWED_OWN_BRING
        for name, statement in list(server.names.items()):
            if mine.get(name) is not statement:
                server.close_statement(statement, name)
        for name, old in list(mine.items()):
            statement = old if old in server.known else self.statement_now(server, name, old)
            if server.known.get(statement) != name:
                server.write(messages.parse(name, statement.tail))
                server.know(statement, name)
                server.replies.add(Entry(kind, statement, name))
        if self.unnamed is not None and server.unnamed is not self.unnamed:
            self.bring_unnamed(server, kind)
        if server.replies.open and not inside:
            server.sync()  # what cannot be prepared any more shall not take the client's next message with it

    def close_name(self, server: ServerConnection, name: bytes) -> None:
        """Close of a statement: the client forgets it, the server keeps it for others."""
        statement = self.undefine_name(name)
        if self.settings is not None and name in self.settings.prepared_names:
            self.touched |= _PREPARED
            server.write(messages.close_statement(name))
            server.replies.expect(_OWED_CLOSE)
            return
        if not name:
            server.unnamed = None
            server.unnamed_at = server.replies.sent
        else:
            server.named_at = server.replies.sent
        if server.replies.kind == _OWED_NONE:
            self.write(messages.CLOSE_COMPLETE)
        else:
            server.replies.add(Entry(_OWED_SYNTHETIC_CLOSE, statement, name, messages.CLOSE_COMPLETE))

    def undefine_name(self, name: bytes) -> Statement | None:
        if not name:
            self.unnamed = None
            return None
        return self.statements.pop(name, None) if self.statements is not None else None

    def in_own_names(self, server: ServerConnection, body: bytes) -> bytes:
        """An error that names a statement as this client does, where the server knows it by another name."""
        for name, statement in (self.statements or {}).items():
            there = server.known.get(statement, name)
            if there != name:
                body = body.replace(b'"' + there + b'"', b'"' + name + b'"')
        return body

    def define(self, name: bytes, statement: Statement | None) -> None:
        """The server discarded the Close of this statement."""
        if statement is not None:
            if self.statements is None:
                self.statements = {}
            self.statements[name] = statement

    def forget_statements(self) -> None:
        """It has dropped all its prepared statements."""
        self.statements = None
        self.unnamed = None

    def undefine(self, name: bytes, statement: Statement | None) -> None:
        """The server discarded the Parse of this statement."""
        if self.statements is not None and statement is not None and self.statements.get(name) is statement:
            del self.statements[name]
