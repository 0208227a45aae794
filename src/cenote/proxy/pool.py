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
from cenote.proxy.asking import Guest, Learning
from cenote.proxy.carrying import Carrying
from cenote.proxy.observe import Watch
from cenote.proxy.roles import Borrower
from cenote.proxy.server import ServerConnection
from cenote.reasons import fatal_failure
from cenote.sql import touch
from cenote.wire import messages

# State that nothing but closing undoes, or that nobody knows.
_FOR_EVER = touch.LOAD | touch.UNKNOWN


def _cost(slot: Slot, settings: Any) -> int:
    """What it costs to make an idle connection carry these settings."""
    server: ServerConnection = slot.data
    return settings.cost_from(server.settings, server.stain) if settings is not None else len(server.stain)


class ProxyPool(Carrying):
    """One pool of the proxy. On the event loop.

    watch: the dry run, None where there is none
    minds_sequences: somebody asks `currval` or `lastval`, or code in this database does: a connection is to have
        no others' in it
    customs_at, customs_of: when the code in this database was last looked through for what it may set; how often
        something had been defined by then
    tick: counts the uses of prepared statements, so that the oldest can be told
    base: what the server says of its parameters at a log-in
    """

    def __init__(self, daemon: Any, database: str, user: str, options: Any, random: Any) -> None:
        super().__init__(options)
        self.daemon = daemon
        self.database = database
        self.user = user
        self.name = f"{database}/{user}"
        self.mode = options.mode
        self.statement_mode = options.mode == "statement"
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
        self.budget: Any = None
        self.servers: set[ServerConnection] = set()
        self.clients = 0
        self.base: dict[bytes, bytes] = {}
        self.audits_all = options.audit == "always"
        self.watch = Watch(self) if options.observe else None
        self.customs_at = 0.0
        self.customs_of = -1
        self.minds_sequences = False
        self.incidents = 0
        self.audits_done = 0
        self.queries = 0
        self.errors = 0
        self.bytes_from_clients = 0
        self.bytes_to_clients = 0
        self.replays = 0
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
            server.discard_sequences(b"")
        if client.stalled:
            server.mute()

    def settled(self, client: Borrower, lent: ServerConnection) -> None:
        """Nothing is owed and no transaction is open: the connection comes back, unless it is kept."""
        server = lent  # the base cannot say what it is
        now = monotonic()
        if server.asked_at:
            self._account(server, now)
        if server.defines:
            server.defines = False
            self.defined()
        if client.ear is not None:
            client.ear.rested()
        if client.pin:
            if client.sight is not None:
                client.sight.rests()
            return
        self._part(client, server)
        server.sequenced = True
        client.since = now
        if server.cancels:
            self.machine.release_touched(server.slot, now)
        elif server.fatal is not None:
            self.machine.release_broken(server.slot, now, "server_closed", self.failure(server))
        elif server.doubtful:
            self.machine.release_broken(server.slot, now, "cancel_failed", "private")
        elif server.audit or server.expires:
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

    def learn(self, client: Any, server: ServerConnection) -> None:
        """A transaction has ended in which something may have been touched: ask the server what came of it."""
        if server.asked_at:
            self._account(server, monotonic())
        client.holding = True
        client.asking = True
        # What was hidden in this transaction is taken for the client's own: no audit will see it.
        server.proof = -1
        Learning(self, client, server).ask()

    def adopt(self, client: Borrower, server: ServerConnection, borrower: Borrower) -> None:
        """Another borrower takes over this lease, with the session as it is."""
        client.since = monotonic()
        self._part(client, server)
        server.sequenced = True
        server.client = borrower
        borrower.server = server
        server.asked_at = 0.0

    def unneeded(self, client: Borrower, server: ServerConnection) -> None:
        """A connection was granted to a client that has nothing to send."""
        self.settled(client, server)

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
        client.conversion = None
        if client.sight is not None:
            client.sight.watch.leaves(client)
        if client.ear is not None:
            client.ear.departed()
        if client.pin:
            self.pinned -= 1
        if server is not None:
            self._part(client, server)
            server.sequenced = server.sequenced or not isinstance(client, Guest)
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
            elif server.rests() and not (
                server.cancels or server.doubtful or server.expires or server.audit or self.session_mode
            ):
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
            if client.conversion is not None and self.tries_again(client):
                client.start_over(server)
            elif batch is not None and (not server.guard or self.tries_again(client)):
                self.replays += 1
                client.resubmit(batch)
            else:
                client.server_lost(server)
        if self.machine.effects:
            self.perform()

    def unfit(self, client: Borrower, lent: ServerConnection) -> None:
        """This connection cannot carry the client's settings, but another one may."""
        server = lent  # the base cannot say what it is
        self._part(client, server)
        self.machine.release_broken(server.slot, monotonic(), "reset_failed", "private")
        client.start_over(server)
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
