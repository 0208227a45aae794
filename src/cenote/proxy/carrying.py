"""What server connections carry: the settings of the client they are lent to, made so when it gets them, and known
anew when the server has said what became of a session.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cenote.proxy.asking import Conversion, Learning, timed_out
from cenote.proxy.pinning import Pinning
from cenote.proxy.prepared import Statement, meaning
from cenote.proxy.roles import Borrower
from cenote.proxy.server import ServerConnection
from cenote.proxy.settings import (
    IDLE_TIMEOUT,
    MAX_PREPARED_BY_SQL,
    ROLES,
    TEMP_BUFFERS,
    Settings,
    Way,
    preparing,
    put_back,
    way,
)
from cenote.proxy.state import HELD, TOLD, Told
from cenote.reasons import Pinned
from cenote.sql import touch
from cenote.wire import messages

_AUDIT_EVERY = 1_000  # after the first time
_MAX_STATEMENTS = 16_384
_MAX_SETTINGS = 4_096
_LOSSES = 5
_MAX_SUSPECTS = 256
MAX_CUSTOMS = 256  # custom settings of one client; and that a pool remembers
_MAX_STAIN = 1_024  # of one connection


class Carrying(Pinning):
    """A lender of connections that carry settings.

    base_items: what init_query has set
    stained: stands for the base state on connections on which custom settings were set, which PostgreSQL never
        forgets: they read as an empty string from then on
    settings: one object for each set of them; ways: conversions that were needed lately
    welcome: what a client with these settings is told of the server's parameters, as messages
    audited: texts that do more than they show, by what `identity_of` calls them, and whether they are known to
        touch session state (or known not to)
    definitions: how often a text has created or altered something: what was known to be harmless is so no more
    customs: names of custom settings that had a value once, those that had one lately last
    code_customs: names of custom settings that code in this database sets
    resets_to: those that RESET may give a value: a log-in begins with it, or a library has defined it
    """

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.session_mode = options.mode == "session"
        self.reads_nothing = self.session_mode  # each client is to be pinned at once
        self.statements: dict[Any, Statement] = {}
        self.settings: dict[Any, Settings] = {}
        self.ways: dict[tuple[Any, Any], Way | None] = {}
        self.welcome: dict[Any, bytes] = {}
        self.base_items: dict[bytes, bytes] = {}
        self.stained = Settings((), None)
        self.audits = options.audit != "off"
        self.audited: dict[bytes, bool] = {}
        self.definitions = 0
        self.customs: dict[bytes, None] = {}
        self.code_customs: frozenset[bytes] = frozenset()
        self.resets_to: frozenset[bytes] = frozenset()
        self.conversions = 0
        self.recovered_plans = 0
        self.transactions = 0

    def convert(self, client: Borrower, server: ServerConnection, guards: bool = False) -> bool:
        """Make the connection carry the client's settings; whether that takes a while (its input is held).

        :param guards: the client's next batch may go right behind: in a failed transaction it does nothing
        """
        if server.settings is client.settings:
            if not client.raw and (self.session_mode or (client.settings is not None and client.settings.opaque)):
                reason = str(Pinned.SESSION_MODE if self.session_mode else Pinned.CLIENT_ENCODING)
                client.keep(server, reason, touch.UNKNOWN)
                client.own_names(server)
            return False
        way = self._way(server.settings, client.settings)
        if way is None:
            return False
        self.conversions += 1
        if client.settings is not None and client.settings.prepared:
            self._free_names(server, client.settings)
        if guards and way.query and not self.session_mode and not server.replies.open:
            server.convert_first(way.query, client.settings)
            return False
        client.holding = True
        client.conversion = Conversion(self, client, server, client.settings, way.sql)
        client.conversion.ask()
        return True

    def tries_again(self, client: Borrower) -> bool:
        """A connection is gone that was to carry this client's settings. Whether it may have another one."""
        client.conversion = None
        client.losses += 1
        return client.losses <= _LOSSES

    def _free_names(self, server: ServerConnection, settings: Settings) -> None:
        """What these settings prepare by SQL is to have its names: others' statements have to go."""
        for name in settings.prepared_names:
            other = server.names.get(name)
            if other is not None:
                server.close_statement(other, name)
        if server.replies.open:
            server.sync()

    def _way(self, carried: Settings | None, wanted: Settings | None) -> Way | None:
        """How to get from the one to the other; None: they are the same. O(1) for what was needed before."""
        key = (carried, wanted)
        if key not in self.ways:
            if len(self.ways) >= _MAX_SETTINGS:
                self.ways.clear()
            self.ways[key] = way(carried, wanted, self.base_items, self.resets_to)
        return self.ways[key]

    def went_first(self, server: ServerConnection, settings: Any, error: Any) -> None:
        """The server has answered to a conversion behind which the client's batch is under way."""
        client = server.client
        if error is None:
            self.carry(server, settings)
            if client is not None:
                client.losses = 0
        elif client is not None:
            client.misfit(error)

    def converted(
        self, client: Borrower, server: ServerConnection, settings: Any, error: Any, cancelled: bool
    ) -> None:
        """The server has answered to a conversion.

        :param cancelled: the client asked for that; or it has taken longer than a query may
        """
        if error is None:
            self.carry(server, settings)
        if server.client is not client:
            return
        if error is not None and _of_its_past(error) and self.tries_again(client):
            self.unfit(client, server)
            return
        client.conversion = None
        if timed_out(error) or (cancelled and error is None):
            said = messages.error("ERROR", "57014", "canceling statement due to user request")
            self.settled(client, server)
            client.refuse(said if error is None else messages.message(b"E", error))
            return
        if error is not None:
            client.holding = False
            client.misfit(error)
            return
        client.losses = 0
        server.answered = False
        self.convert(client, server)
        client.go_on()

    def carry(self, server: ServerConnection, settings: Settings | None) -> None:
        """What this connection carries from now on."""
        if settings is not None:
            server.stain |= settings.customs
            if len(server.stain) > _MAX_STAIN:
                server.slot.expires = 0.0  # nobody after this client
        elif server.stain:
            settings = self.stained
        server.settings = settings
        server.slot.settings = settings
        server.expires = settings is not None and settings.expires

    def lasting(self, settings: Settings) -> Settings | None:
        """The same settings, but that the server ends no session with them for being idle."""
        items = tuple([item for item in settings.items if item[0] != IDLE_TIMEOUT])
        return self.settings_of(items, settings.prepared)

    def cleared(self, client: Borrower, server: ServerConnection, kinds: int) -> None:
        """A text that only clears session state was answered."""
        resets, client.resets = client.resets, None
        untold = resets is not None
        server.proof = -1
        if not server.failed:
            client.ties &= ~(kinds & touch.SETTINGS)
            self.forgotten(client, server, kinds)
            client.touched |= kinds & client.ties
            if kinds & touch.LISTEN and client.ear is not None:
                client.ear.forget()
            if kinds & touch.SETTINGS:
                items = dict(client.startup.items) if client.startup is not None else {}
                if not kinds & touch.ROLE:
                    roles = client.settings.roles() if client.settings is not None else ()
                    items = {name: value for name, value in items.items() if name not in ROLES} | dict(roles)
                prepared = client.settings.prepared if client.settings is not None else ()
                for name in client.settings.customs if client.settings is not None else ():
                    if name not in self.base_items and name not in self.resets_to:
                        items.setdefault(name, b"")  # RESET leaves no more of it
                client.settings = self.settings_of(tuple(sorted(items.items())), prepared)
                self.carry(server, client.settings)
                if resets:
                    if self.put_back(client, server, resets, True):
                        return
                    untold = False
        if untold:
            client.write(messages.ready(bytes((server.status,))))
        client.go_on_after(server)

    def forgotten(self, client: Borrower, server: ServerConnection, kinds: int) -> None:
        """What no roll-back brings back is gone: statements, and what sequences have said."""
        if kinds & touch.PREPARED:
            server.forget_all()
            client.forget_statements()
            if client.settings is not None and client.settings.prepared:
                client.settings = self.settings_of(client.settings.items)
                self.carry(server, client.settings)
        client.ties &= ~(kinds & touch.SEQUENCE)
        if client.pin and not client.ties:
            client.unpin()

    def put_back(
        self, client: Borrower, server: ServerConnection, resets: dict[bytes, bool], untold: bool
    ) -> bool:
        """A RESET has led to the server's base state, and the client's is another: give it that. Whether there is
        something to wait for.

        :param resets: what may have been reset, and whether for the transaction only
        :param untold: the client waits for its ReadyForQuery
        """
        items = {**self.base_items, **dict(client.startup.items if client.startup is not None else ())}
        lost = [
            (name, value, resets.get(name, resets.get(b"*", False)))
            for name, value in items.items()
            if name in resets or (b"*" in resets and name not in ROLES)
        ]
        if not lost:
            if untold:
                client.write(messages.ready(bytes((server.status,))))
            return False
        client.holding = True
        client.asking = True
        learning = Learning(self, client, server)
        learning.untold = untold
        learning.sql = put_back(lost, server.defaults)
        server.inject(learning.sql, learning.put_back, None, True)
        return True

    def suspect(self, server: ServerConnection, text: bytes) -> bool:
        """A text that does more than it shows is about to run: whether it is known to touch session state."""
        known = self.audited.get(text)
        if known is None or server.audit or self.transactions % _AUDIT_EVERY == 0:
            server.audit = True
            if not server.suspects:
                server.proof = self.definitions
            if len(server.suspects) < _MAX_SUSPECTS:
                server.suspects[text] = known is None
        return known is True

    def audit_told(self, texts: Iterable[bytes], leaks: bool) -> None:
        """What an audit has found behind these texts."""
        if len(self.audited) >= _MAX_STATEMENTS:
            self._forget_harmless()
        if len(self.audited) < _MAX_STATEMENTS:
            for text in texts:
                self.audited[text] = leaks

    def defined(self) -> None:
        """A text has created or altered something: what a function does may be something else from now on."""
        self.definitions += 1
        self._forget_harmless()

    def _forget_harmless(self) -> None:
        self.audited = {text: True for text, leaks in self.audited.items() if leaks}

    def custom_names(self) -> set[bytes]:
        """Custom settings that may have a value, whoever has set them."""
        return {*self.code_customs, *self.customs}

    def had_values(self, customs: dict[bytes, bytes]) -> None:
        """Custom settings that have a value now, if only for one client. Those that never had one are not kept:
        they are any words with a dot in between."""
        for name, value in customs.items():
            if value:
                self.customs.pop(name, None)
                self.customs[name] = None
        while len(self.customs) > MAX_CUSTOMS:
            del self.customs[next(iter(self.customs))]

    def resettable(self, customs: Iterable[bytes]) -> None:
        """RESET may leave more than an empty string of these."""
        names = self.resets_to.union(customs)
        if names != self.resets_to:
            self.resets_to = names
            self.ways.clear()

    def base_of(self, server: ServerConnection) -> dict[bytes, bytes]:
        """What a client that has set nothing has on this connection, as far as pg_settings does not say so."""
        return {**server.defaults, **self.base_items}

    def learned(self, client: Any, server: ServerConnection, told: Told) -> None:
        """The server has said what there is."""
        if told.settings is not None or told.roles is not None or told.looked:
            before = client.settings.items if client.settings is not None else ()
            had = client.settings.customs if client.settings is not None else frozenset()
            others = server.stain - had - (client.customs or set())  # empty, they are what those have left
            server.stain |= told.customs.keys()
            told.customs = {name: value for name, value in told.customs.items() if value or name not in others}
            self.had_values(told.customs)
            self.resettable(told.defined)
            items = told.items(before, self.base_of(server))
            if items != before or told.asked != TOLD:  # what can do anything may have done nothing
                role = told.settings is None and not told.looked
                self.note(f"carried: {Pinned.ROLE if role else Pinned.SETTINGS}", client.text)
            client.settings = self.settings_of(items, client.settings.prepared if client.settings else ())
            self.carry(server, client.settings)
            client.customs = None
            if client.settings is not None and len(client.settings.customs) > MAX_CUSTOMS:
                if not self.keeps(client, server, str(Pinned.UNKNOWN), touch.UNKNOWN):
                    return
                client.own_names(server)
        if told.prepared is not None and not self._learned_names(client, server, told):
            if not self.keeps(client, server, str(Pinned.PREPARED_BY_SQL), touch.UNKNOWN):
                return
            client.own_names(server)
        asked = told.asked & HELD | (touch.SETTINGS if told.settings is not None else 0)
        held = client.ties & ~asked | told.held
        if told.held & touch.LISTEN:
            self.note(f"carried: {Pinned.LISTEN}", client.text)
        if held & touch.LISTEN or (client.ear is not None and told.asked & touch.LISTEN):
            self.listener.settle(client, server, held)
        else:
            self.tied(client, server, held)

    def _learned_names(self, client: Any, server: ServerConnection, told: Told) -> bool:
        """The server has said which statements are prepared there. Whether they can be carried."""
        had = dict(client.settings.prepared) if client.settings is not None else {}
        prepared: dict[bytes, bytes] = {}
        anew: dict[bytes, bytes] = {}  # prepared amid other settings: not what another client has by this text
        for name, text in (told.prepared or {}).items():
            # What was carried here was prepared by us: its own text is known better.
            alone = had[name] if text == had.get(name) else preparing(name, text)
            if alone is None or len(prepared) >= MAX_PREPARED_BY_SQL:
                return False
            prepared[name] = alone
            if client.apart and alone != had.get(name):
                anew[name] = b""
        if anew and (client.pin or told.held):
            return False  # while it is kept, what it carries is learned again, and this forgotten
        if prepared != had:
            self.note("carried: prepared", client.text)
            items = client.settings.items if client.settings is not None else ()
            client.settings = self.settings_of(items, tuple(sorted(prepared.items())))
            self.carry(server, self.settings_of(items, tuple(sorted({**prepared, **anew}.items()))))
        for name, statement in list(server.names.items()):
            there = (told.named or {}).get(name)
            if there is None:
                server.forget(statement)
                if client.statements is not None and client.statements.get(name) is statement:
                    del client.statements[name]
            elif there != statement.tail[: statement.tail.index(b"\0")]:
                return False  # dropped by SQL, and another one prepared in its place
        return True

    def tied(self, client: Any, server: ServerConnection, held: int) -> None:
        """A client has these kinds of state that keep a connection, and goes on."""
        if held == touch.LISTEN:
            client.keep(server, self.pin_reason(held), held)  # until the shared connection takes its channels
        elif held and not self.keeps(client, server, self.pin_reason(held), held):
            return
        client.ties = held
        if client.pin and not held:
            client.unpin()
        elif held:
            client.pin = self.pin_reason(held) if not held & touch.UNKNOWN else client.pin
        if server.settings is client.settings:
            self.convert(client, server)  # an encoding that cannot be read pins
        client.go_on_after(server)

    def settings_of(self, items: Any, prepared: Any = ()) -> Settings | None:
        """The one object for these settings and statements prepared by SQL; None where there are none."""
        if not (items or prepared):
            return None
        key = (items, prepared)
        settings = self.settings.get(key)
        if settings is None:
            if len(self.settings) >= _MAX_SETTINGS:
                self.settings.clear()
                self.welcome.clear()
            settings = Settings(items, meaning(items), prepared)
            self.settings[key] = settings
            self.reads_nothing = self.reads_nothing or settings.opaque
        return settings

    def statement(self, settings: Settings | None, tail: bytes, reading: Any) -> Statement:
        """The statement that is this text with these types under these settings. O(tail)"""
        means = settings.meaning if settings is not None else None
        key = (means, tail)
        statement = self.statements.get(key)
        if statement is None:
            if len(self.statements) >= _MAX_STATEMENTS:
                self.statements.clear()  # those in use stay with who uses them
            statement = Statement(tail, reading, means)
            self.statements[key] = statement
        return statement

    def known(self, settings: Settings | None, tail: bytes) -> Statement | None:
        """The statement, if a server has parsed it."""
        statement = self.statements.get((settings.meaning if settings is not None else None, tail))
        return statement if statement is not None and statement.proved else None

    def plan_changed(self, statement: Statement) -> None:
        """The rows of this statement have changed: who prepares it from now on gets a new one."""
        if not statement.changed:
            statement.changed = True
            self.recovered_plans += 1
            self.retire(statement)

    def retire(self, statement: Statement) -> None:
        """Who prepares this text from now on has it parsed anew. O(statements), after an error only."""
        for key, known in list(self.statements.items()):
            if known is statement:
                del self.statements[key]


def _of_its_past(error: bytes) -> bool:
    """Whether a connection cannot be made to carry settings for what was done there before."""
    return TEMP_BUFFERS.decode() in messages.error_fields(error).get("D", "")
