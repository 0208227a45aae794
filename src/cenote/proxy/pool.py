"""The shell of one pool machine in the proxy: who borrows, what the machine wants done, and the counters.

One per database and user. What is on the path of every transaction is here; what takes time (dialing,
cleaning, closing, cancelling) is in `works.py`. It decides nothing about who gets a connection.
"""

from __future__ import annotations

from time import monotonic
from typing import Any

from cenote.core.histogram import Histogram
from cenote.core.machine import GRANT, REFUSE, SERVE, WAKE, Machine
from cenote.core.slot import Slot
from cenote.proxy.asking import Conversion, Learning
from cenote.proxy.listener import Listener
from cenote.proxy.observe import Watch
from cenote.proxy.prepared import Statement, fingerprint_of, meaning
from cenote.proxy.roles import Borrower, Lender
from cenote.proxy.server import ServerConnection
from cenote.proxy.settings import MAX_PREPARED_BY_SQL, ROLES, Settings, Way, preparing, put_back, way
from cenote.proxy.state import HELD, TOLD, Told
from cenote.reasons import ADVICE, TEXT, Pinned, fatal_failure
from cenote.sql import touch
from cenote.wire import messages

# Plain strings: a compiled attribute that is a `str` takes no member of an enum.
_PIN_WORDS = {
    touch.SETTINGS: str(Pinned.SETTINGS),
    touch.ROLE: str(Pinned.ROLE),
    touch.TEMP: str(Pinned.TEMPORARY_OBJECTS),
    touch.ADVISORY: str(Pinned.ADVISORY_LOCKS),
    touch.LISTEN: str(Pinned.LISTEN),
    touch.CURSOR: str(Pinned.HELD_CURSORS),
    touch.PREPARED: str(Pinned.PREPARED_BY_SQL),
    touch.SEQUENCE: str(Pinned.SEQUENCES),
    touch.PLANS: str(Pinned.PLANS),
    touch.LOAD: str(Pinned.PROCESS_STATE),
    touch.UNKNOWN: str(Pinned.UNKNOWN),
}
# State that nothing but closing undoes, or that nobody knows.
_FOR_EVER = touch.LOAD | touch.UNKNOWN
_MAX_LEDGER = 1_000
_AUDIT_EVERY = 1_000  # after the first time
_MAX_STATEMENTS = 16_384
_MAX_SETTINGS = 4_096


def _cost(slot: Slot, settings: Any) -> int:
    """What it costs to make an idle connection carry these settings."""
    server: ServerConnection = slot.data
    return settings.cost_from(server.settings, server.stain) if settings is not None else len(server.stain)


class ProxyPool(Lender):
    """One pool of the proxy. On the event loop.

    base_items: what init_query has set
    stained: stands for the base state on connections on which custom settings were set, which PostgreSQL never
        forgets: they read as an empty string from then on
    ways: conversions that were needed lately
    ledger: how often which kind of text pinned, set or was refused; unlisted: what there was no more room for
    watch: the dry run, None where there is none
    audited: fingerprints of texts that do more than they show, and whether they are known to touch session state
    minds_sequences: somebody asks `currval` or `lastval`: a connection is to have no others' in it
    customs: names of custom settings that somebody may set
    tick: counts the uses of prepared statements, so that the oldest can be told
    welcome: what a client with these settings is told of the server's parameters, as messages
    """

    def __init__(self, daemon: Any, database: str, user: str, options: Any, random: Any) -> None:
        super().__init__()
        self.daemon = daemon
        self.database = database
        self.user = user
        self.name = f"{database}/{user}"
        self.options = options
        self.mode = options.mode
        self.session_mode = options.mode == "session"
        self.statement_mode = options.mode == "statement"
        self.reads_nothing = self.session_mode  # each client is to be pinned at once
        self.acquire_timeout = options.acquire_timeout
        self.max_prepared = options.max_prepared
        self.machine = Machine(
            options.min_size,
            options.max_size,
            options.max_waiting,
            options.idle_timeout,
            options.max_lifetime,
            options.check_after,
            options.codel,
            random,
        )
        self.machine.shelf.cost = _cost
        self.works: Any = None
        self.budget: Any = None
        self.servers: set[ServerConnection] = set()
        self.clients = 0
        self.statements: dict[Any, Statement] = {}
        self.settings: dict[Any, Settings] = {}
        self.ways: dict[tuple[Any, Any], Way | None] = {}
        self.welcome: dict[Any, bytes] = {}
        self.base: dict[bytes, bytes] = {}
        self.base_items: dict[bytes, bytes] = {}
        self.stained = Settings((), None)
        self.audits = options.audit != "off"
        self.audits_all = options.audit == "always"
        self.audited: dict[bytes, bool] = {}
        self.max_pinned = options.max_pinned or max(1, options.max_size - 1)
        self.refuses_pins = options.unsafe == "refuse"
        self.ledger: dict[tuple[str, bytes], int] = {}
        self.unlisted = 0
        self.watch = Watch(self) if options.observe else None
        self.customs: set[bytes] = set()
        self.customs_due = True
        self.minds_sequences = False
        self.incidents = 0
        self.audits_done = 0

        self.transactions = 0
        self.queries = 0
        self.errors = 0
        self.bytes_from_clients = 0
        self.bytes_to_clients = 0
        self.recovered_plans = 0
        self.replays = 0
        self.pins: dict[str, int] = {}
        self.pinned = self.conversions = 0
        self.listener = Listener(self)
        self.transaction_s = Histogram()
        self.query_s = Histogram()

    # -- on the path of every transaction ---------------------------------------------------------------------

    def borrow(self, client: Borrower) -> ServerConnection | None:
        """A server connection for the client's next message, or None: it stands in line, or was declined. It may
        carry other settings than the client's: `convert` is next."""
        now = monotonic()
        got = self.machine.acquire(now, self.acquire_timeout, client.settings, client)
        if isinstance(got, Slot):
            slot = got
            server = slot.data
            self._lend(server, client, now)
            if self.machine.effects:
                self.perform()
            return server  # type: ignore[no-any-return]
        if got.refused:
            client.declined = self.refusal(got.refused)
        else:
            client.waiter = got
            client.since = now
            client.noticed = False
        if self.machine.effects:
            self.perform()
        return None

    def _lend(self, server: ServerConnection, client: Borrower, now: float) -> None:
        server.client = client
        client.server = server
        server.began_at = now
        server.asked_at = now
        server.lease_tick = self.tick
        server.answered = False
        server.failed = False
        server.unparsed = False
        server.taken_at = -1
        if self.audits_all:
            server.audit = True
        if server.sequenced and self.minds_sequences:
            server.sequenced = False
            server.inject(b"DISCARD SEQUENCES", None)
        if client.stalled:
            server.mute()

    def settled(self, client: Borrower, lent: ServerConnection) -> None:
        """Nothing is owed and no transaction is open: the connection comes back, unless it is kept."""
        server = lent  # the base cannot say what it is
        now = monotonic()
        if server.asked_at:
            self._account(server, now)
        if client.ear is not None:
            client.ear.rested()
        if client.pin:
            if client.sight is not None:
                client.sight.rests()
            return
        self._part(client, server)
        if server.hid:
            server.sequenced = True
            server.hid = False
        client.since = now
        if server.cancels:
            self.machine.release_touched(server.slot, now)
        elif server.fatal is not None:
            self.machine.release_broken(server.slot, now, "server_closed", self.failure(server))
        elif server.doubtful:
            self.machine.release_broken(server.slot, now, "cancel_failed", "private")
        elif server.audit:
            self.machine.release_touched(server.slot, now)
        else:
            self.machine.release(server.slot, now)
        if self.machine.effects:
            self.perform()

    def _account(self, server: ServerConnection, now: float) -> None:
        """A request and its transaction have ended."""
        self.queries += 1
        self.query_s.observe(now - server.asked_at)
        self.errors += server.failed
        self.transactions += 1
        self.transaction_s.observe(now - server.began_at)
        server.asked_at = 0.0

    def in_transaction(self, client: Borrower, lent: ServerConnection) -> None:
        """A request was answered, and a transaction is open."""
        server = lent
        if server.asked_at:
            now = monotonic()
            self.queries += 1
            self.query_s.observe(now - server.asked_at)
            self.errors += server.failed
            server.asked_at = 0.0
            client.since = now
        if client.ear is not None:
            client.ear.in_transaction(server)
        if self.statement_mode:
            client.fail("08P01", "cenote: transactions are not possible in statement mode")

    def perform(self) -> None:
        """Do what the machine wants. On the event loop, at the end of whatever made it want something."""
        machine = self.machine
        while machine.effects:
            effects = machine.effects
            machine.effects = []
            for what, subject in effects:
                if what == GRANT:
                    if subject.slot is None:
                        continue
                    client = subject.data
                    subject.data = None  # the machine may keep it for a while
                    server = machine.accept(subject).data
                    self._lend(server, client, monotonic())
                    client.granted(server)
                elif what == REFUSE:
                    subject.data.refuse(self.refusal(subject.refused))
                elif what == WAKE:
                    self.works.wake(machine.alarm)
                elif what == SERVE:
                    self.budget.serve_soon()
                else:
                    self.works.start(what, subject)

    def _part(self, client: Borrower, server: ServerConnection) -> None:
        client.server = None
        server.client = None
        server.batch = None
        if server.muted:
            server.unmute()
        if client.muted:
            client.hear()

    # -- what happens now and then ----------------------------------------------------------------------------

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
        Conversion(self, client, server, client.settings, way.sql).ask()
        return True

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
            self.ways[key] = way(carried, wanted, self.base_items)
        return self.ways[key]

    def went_first(self, server: ServerConnection, settings: Any, error: Any) -> None:
        """The server has answered to a conversion behind which the client's batch is under way."""
        if error is None:
            self.carry(server, settings)
        elif server.client is not None:
            server.client.misfit(error)

    def converted(self, client: Borrower, server: ServerConnection, settings: Any, error: Any) -> None:
        """The server has answered to a conversion."""
        if error is None:
            self.carry(server, settings)
        if server.client is not client:
            return
        if error is not None:
            client.holding = False
            client.misfit(error)
            return
        server.answered = False
        self.convert(client, server)
        client.go_on()

    def cleared(self, client: Borrower, server: ServerConnection, kinds: int) -> None:
        """A text that only clears session state was answered."""
        resets, client.resets = client.resets, None
        untold = resets is not None
        if not server.failed:
            if kinds & touch.PREPARED:
                server.forget_all()
                client.forget_statements()
                if client.settings is not None and client.settings.prepared:
                    client.settings = self.settings_of(client.settings.items)
                    self.carry(server, client.settings)
            client.ties &= ~(kinds & touch.SEQUENCE)
            client.touched |= kinds & client.ties
            if kinds & touch.LISTEN and client.ear is not None:
                client.ear.forget()
            if client.pin and not client.ties:
                client.unpin()
            if kinds & touch.SETTINGS:
                items = dict(client.startup.items) if client.startup is not None else {}
                if not kinds & touch.ROLE:
                    roles = client.settings.roles() if client.settings is not None else ()
                    items = {name: value for name, value in items.items() if name not in ROLES} | dict(roles)
                prepared = client.settings.prepared if client.settings is not None else ()
                for name in client.settings.customs if client.settings is not None else ():
                    if name not in self.base_items:
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

    def carry(self, server: ServerConnection, settings: Settings | None) -> None:
        """What this connection carries from now on."""
        if settings is not None:
            server.stain |= settings.customs
        elif server.stain:
            settings = self.stained
        server.settings = settings
        server.slot.settings = settings

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
            (name, value, resets.get(name, False))
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
        learning.sql = put_back(lost)
        server.inject(learning.sql, learning.put_back, None, True)
        return True

    def suspect(self, server: ServerConnection, fingerprint: bytes) -> bool:
        """A text that does more than it shows is about to run: whether it is known to touch session state."""
        known = self.audited.get(fingerprint)
        if known is None:
            if len(self.audited) >= _MAX_STATEMENTS:
                self.audited.clear()
            self.audited[fingerprint] = False
            server.audit = True
            server.suspects.append(fingerprint)
        elif self.transactions % _AUDIT_EVERY == 0:
            server.audit = True
            server.suspects.append(fingerprint)
        return known is True

    def learn(self, client: Any, server: ServerConnection) -> None:
        """A transaction has ended in which something may have been touched: ask the server what came of it."""
        if server.asked_at:
            self._account(server, monotonic())
        client.holding = True
        client.asking = True
        learning = Learning(self, client, server)
        learning.ask()
        if learning.customs:
            self.customs |= learning.customs

    def learned(self, client: Any, server: ServerConnection, told: Told, customs: set[bytes]) -> None:
        """The server has said what there is."""
        if told.settings is not None or told.roles is not None or customs:
            before = client.settings.items if client.settings is not None else ()
            had = client.settings.customs if client.settings is not None else frozenset()
            others = server.stain - had - (client.customs or set())  # empty, they are what those have left
            server.stain |= told.customs.keys()
            told.customs = {name: value for name, value in told.customs.items() if value or name not in others}
            items = told.items(before, self.base_items, customs)
            if items != before or told.asked != TOLD:  # what can do anything may have done nothing
                role = told.settings is None and not customs
                self.note(f"carried: {Pinned.ROLE if role else Pinned.SETTINGS}", client.text)
            client.settings = self.settings_of(items, client.settings.prepared if client.settings else ())
            self.carry(server, client.settings)
        if told.prepared is not None and not self._learned_names(client, server, told):
            client.keep(server, str(Pinned.PREPARED_BY_SQL), touch.UNKNOWN)
            client.own_names(server)
        held = client.ties & ~(told.asked & HELD) | told.held
        if told.held & touch.LISTEN:
            self.note(f"carried: {Pinned.LISTEN}", client.text)
        if held & touch.LISTEN or (client.ear is not None and told.asked & touch.LISTEN):
            self.listener.settle(client, server, held)
        else:
            self.tied(client, server, held)

    def tied(self, client: Any, server: ServerConnection, held: int) -> None:
        """A client has these kinds of state that keep a connection, and goes on."""
        if held and not client.pin:
            client.keep(server, self.pin_reason(held), held)
        client.ties = held
        if client.pin and not held:
            client.unpin()
        elif held:
            client.pin = self.pin_reason(held) if not held & touch.UNKNOWN else client.pin
        self.convert(client, server)  # an encoding that cannot be read pins
        client.go_on_after(server)

    def adopt(self, client: Borrower, server: ServerConnection, borrower: Borrower) -> None:
        """Another borrower takes over this lease, with the session as it is."""
        client.since = monotonic()
        self._part(client, server)
        server.client = borrower
        borrower.server = server
        server.asked_at = 0.0

    def _learned_names(self, client: Any, server: ServerConnection, told: Told) -> bool:
        """The server has said which statements are prepared there. Whether they can be carried."""
        had = dict(client.settings.prepared) if client.settings is not None else {}
        prepared: dict[bytes, bytes] = {}
        for name, text in (told.prepared or {}).items():
            # What was carried here was prepared by us: its own text is known better.
            alone = had[name] if text == had.get(name) else preparing(name, text)
            if alone is None or len(prepared) >= MAX_PREPARED_BY_SQL:
                return False
            prepared[name] = alone
        if prepared != had:
            self.note("carried: prepared", client.text)
            items = client.settings.items if client.settings is not None else ()
            client.settings = self.settings_of(items, tuple(sorted(prepared.items())))
            self.carry(server, client.settings)
        for name, statement in list(server.names.items()):
            there = (told.named or {}).get(name)
            if there is None:
                server.forget(statement)
                if client.statements is not None and client.statements.get(name) is statement:
                    del client.statements[name]
            elif there != statement.tail[: statement.tail.index(b"\0")]:
                return False  # dropped by SQL, and another one prepared in its place
        return True

    def unneeded(self, client: Borrower, server: ServerConnection) -> None:
        """A connection was granted to a client that has nothing to send."""
        self.settled(client, server)

    def statement(self, settings: Settings | None, tail: bytes, reading: Any) -> Statement:
        """The statement that is this text with these types under these settings. O(tail)"""
        key = (settings.meaning if settings is not None else None, tail)
        statement = self.statements.get(key)
        if statement is None:
            if len(self.statements) >= _MAX_STATEMENTS:
                self.statements.clear()  # those in use stay with who uses them
            statement = Statement(tail, reading)
            self.statements[key] = statement
        return statement

    def known(self, settings: Settings | None, tail: bytes) -> Statement | None:
        """The statement, if a server has parsed it."""
        statement = self.statements.get((settings.meaning if settings is not None else None, tail))
        return statement if statement is not None and statement.proved else None

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

    def pin_reason(self, touches: int) -> str:
        """The word for the first kind of state that is touched, the gravest first."""
        for flag in (touch.UNKNOWN, touch.LOAD, touch.ROLE, *_PIN_WORDS):
            if touches & flag:
                return _PIN_WORDS[flag]
        return str(Pinned.UNKNOWN)

    def pinned_by(self, client: Any, reason: str) -> None:
        """A client keeps its connection from now on."""
        self.pins[reason] = self.pins.get(reason, 0) + 1
        self.pinned += 1
        if reason != Pinned.SESSION_MODE:
            self.note(f"pinned: {reason}", client.text)
            self.works.log_pin(client, reason)

    def pins_none(self, touches: int) -> bool:
        """Whether one more client may not keep its connection for this."""
        shared = self.listener.server is not None
        room = self.pinned + shared < self.max_pinned
        if touches == touch.LISTEN and self.machine.max_size > 1 and (shared or room):
            return False  # the connection that all listeners share is kept, if any
        return bool(self.refuses_pins or not room)

    def refused_pin(self, touches: int, text: bytes) -> bytes:
        """The error that says so."""
        reason = self.pin_reason(touches)
        self.note(f"refused: {reason}", text)
        return messages.error("ERROR", "53300", self._no_pin(reason), hint=ADVICE.get(reason, ""))

    def refusing(self, touches: int, text: bytes) -> bytes:
        """A query that fails with that error, in place of one that would pin: in a transaction it fails, too."""
        reason = self.pin_reason(touches)
        self.note(f"refused: {reason}", text)
        quoted = [
            part.replace("'", "''").replace("$", "") for part in (self._no_pin(reason), ADVICE.get(reason, ""))
        ]
        return messages.query(
            "DO $cenote$BEGIN RAISE EXCEPTION USING ERRCODE = '53300', "
            f"MESSAGE = '{quoted[0]}', HINT = '{quoted[1]}';END$cenote$"
        )

    def _no_pin(self, reason: str) -> str:
        why = TEXT["pinned"][reason]
        if self.refuses_pins:
            return (
                f'cenote: pool "{self.name}" refuses what ties a client to a connection (unsafe = refuse): {why}'
            )
        return (
            f'cenote: pool "{self.name}": {self.pinned} clients keep a connection of their own already, '
            f"{'one is shared by all who listen, ' if self.listener.server is not None else ''}and"
            f" max_pinned is {self.max_pinned}: {why}"
        )

    def note(self, what: str, text: bytes) -> None:
        """Write into the ledger that this kind of text has had this consequence. O(text)"""
        key = (what, fingerprint_of(text.partition(b"\0")[0]))
        if key in self.ledger or len(self.ledger) < _MAX_LEDGER:
            self.ledger[key] = self.ledger.get(key, 0) + 1
        else:
            self.unlisted += 1

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

    def refusal(self, reason: str) -> bytes:
        """The error that says why there is no connection, with the numbers."""
        return self.works.refusal(reason)  # type: ignore[no-any-return]

    # -- ends -------------------------------------------------------------------------------------------------

    def client_gone(self, client: Borrower) -> None:
        """A client has left, in whatever state."""
        now = monotonic()
        waiter = client.waiter
        if waiter is not None:
            client.waiter = None
            self.machine.abandon(waiter, now)
            waiter.data = None
        server = client.server
        if client.sight is not None:
            client.sight.watch.leaves(client)
        if client.ear is not None:
            client.ear.departed()
        if client.pin:
            self.pinned -= 1
        if server is not None:
            self._part(client, server)
            slot = server.slot
            if server.lost:
                pass  # its own end is being told
            elif client.left and not client.dropping:
                self.machine.release_broken(slot, now, "unfinished", "private")
            elif client.ties & _FOR_EVER and not self.session_mode:
                self.machine.release_broken(slot, now, "pinned", "private")
            elif client.ties or client.touched or client.resets:
                server.unclean = True
                self.machine.release_touched(slot, now)
            elif server.rests() and not (server.cancels or server.doubtful or self.session_mode):
                self.machine.release(slot, now)
            else:
                self.machine.release_touched(slot, now)
        if self.machine.effects:
            self.perform()

    def server_gone(self, server: ServerConnection) -> None:
        """A server connection has ended. One that nobody awaits is told to the machine here."""
        self.servers.discard(server)
        slot = server.slot
        if slot is None:
            return
        now = monotonic()
        failure = self.failure(server)
        state = slot.state()
        client = server.client
        if state == "idle":
            self.machine.idle_lost(slot, now, "server_closed", failure)
        elif state == "leased" and client is not None:
            batch = server.batch if server.replaying else None
            self._part(client, server)
            self.machine.release_broken(slot, now, "server_closed", failure)
            if batch is not None:
                self.replays += 1
                client.resubmit(batch)
            else:
                client.server_lost(server)
        if self.machine.effects:
            self.perform()

    def failure(self, server: ServerConnection) -> str:
        """What the end of this connection says about the others."""
        fields = messages.error_fields(server.fatal) if server.fatal is not None else {}
        return str(fatal_failure(fields.get("C", "")) or "connection")

    def idle_ended(self, server: ServerConnection) -> None:
        """A connection that owes nothing has said something: its farewell, or what makes no sense."""
        if server.slot is not None and server.slot.state() == "idle":
            self.machine.idle_lost(server.slot, monotonic(), "server_closed", self.failure(server))
            self.perform()
        else:
            server.abort()

    def broken(self, server: ServerConnection, error: Exception) -> None:
        """The server broke the protocol: this pair ends."""
        now = monotonic()
        self.works.log_broken(server, error)
        client = server.client
        slot = server.slot
        if client is not None:
            self._part(client, server)
            client.fail("08P01", f"cenote: {error}")
        if slot is not None:
            state = slot.state()
            if state == "leased":
                self.machine.release_broken(slot, now, "protocol", "private")
            elif state == "idle":
                self.machine.idle_lost(slot, now, "protocol", "private")
        server.abort()
        if self.machine.effects:
            self.perform()

    def cancel_now(self, server: ServerConnection) -> None:
        """Pass on the cancel that waited for the client's own request."""
        wanted = server.cancel_wanted
        server.cancel_wanted = 0.0
        if wanted == server.asked_at:
            self.works.cancel(server)

    def tick_now(self) -> None:
        """The machine's alarm has come."""
        self.machine.tick(monotonic())
        if self.machine.effects:
            self.perform()
