"""What the two sides of a loan know of each other: the one who borrows, and the one who lends.

Compiled modules cannot import each other in a circle; these bases break it. They hold what is read on the
path of every transaction and decide nothing.
"""

from __future__ import annotations

from typing import Any

from cenote.proxy.peer import Peer


class Borrower(Peer):
    """Who may have a server connection: a client session, or a guest of our own.

    settings: what the connection has to carry beside its base state; startup: what that was at its log-in
    touched: flags of what its texts may have touched since the server was last asked
    ties: flags of what its connection has and cannot be carried: why it is pinned. UNKNOWN never ends
    asking: its input waits for the answer to a question of ours
    conversion: its input waits, and nothing of it was sent, until the connection carries its settings; else None
    losses: how many connections it has lost since, in a row, while they were made to carry its settings
    resets: settings that may have gone back to the server's base state, which is not this borrower's, and whether
        for the transaction only; `*` is all but the role; None: there are none
    waiter: its place in the pool's line; declined: the error instead of a connection
    apart: its transaction may have other settings than these, which change what a text means: what it prepares
        now is nobody else's
    guessed: the statement whose Parse, without a server connection, was answered here in what it has sent last
    holding: its input waits; raw: nothing is translated for it any more
    ear: what hears the notifications that come on its server connection; None: they go straight on
    left: bytes of a message that are still to come; dropping: and will not be sent on
    polite: it has said goodbye, and waits for its last answers
    sight: what transaction mode would have made of it, in a dry run; else None
    order_asked: it waits until it is known what became of the batches before
    copy_asked: it waits until all is answered, or the server reads CopyData
    """

    def __init__(self) -> None:
        super().__init__()
        self.server: Any = None
        self.settings: Any = None
        self.waiter: Any = None
        self.declined: bytes | None = None
        self.unnamed: bytes | None = None
        self.apart = False
        self.guessed: Any = None
        self.holding = False
        self.raw = False
        self.copy_asked = False
        self.order_asked = False
        self.noticed = False
        self.polite = False
        self.dropping = False
        self.left = 0
        self.startup: Any = None
        self.touched = 0
        self.ties = 0
        self.resets: Any = None
        self.asking = False
        self.conversion: Any = None
        self.losses = 0
        self.bytes_out = 0
        self.since = 0.0
        self.pin = ""
        self.sight: Any = None
        self.address = ""
        self.ear: Any = None

    def answered(self, server: Any) -> None:
        """The server owes nothing, and is in the transaction status it says."""

    def in_order(self) -> None:
        """A batch was answered to its end, and others are under way."""

    def copy_begins(self) -> None:
        """The Execute of a COPY was answered."""

    def repeat(self, batch: bytes) -> None:
        """A plan was wrong: prepare anew and send the batch once more."""

    def granted(self, server: Any) -> None:
        """The pool's line has come to this borrower."""

    def hear(self) -> None:
        """Read again, if nothing stands against it."""

    def keep(self, server: Any, reason: str, flags: int) -> None:
        """Have this server connection for as long as it has this state."""

    def unpin(self) -> None:
        """Nothing ties it to its connection any more."""

    def own_names(self, server: Any) -> None:
        """The names on this server connection are the borrower's own."""

    def go_on(self) -> None:
        """Whatever held the input is over."""

    def go_on_after(self, server: Any) -> None:
        """A text that cleared session state was answered."""

    def in_own_names(self, server: Any, body: bytes) -> bytes:
        """An error that names statements as the borrower does."""
        return body

    def define(self, name: bytes, statement: Any) -> None:
        """The server discarded the Close of this statement."""

    def undefine(self, name: bytes, statement: Any) -> None:
        """The server discarded the Parse of this statement."""

    def forget_statements(self) -> None:
        """It has dropped all its prepared statements."""

    def refuse(self, error: bytes) -> None:
        """There is no server connection, and this is what to say."""

    def misfit(self, error: bytes) -> None:
        """The server refuses the settings this borrower wants."""

    def resubmit(self, batch: bytes) -> None:
        """The server ended before anything of this batch ran."""

    def start_over(self, server: Any) -> None:
        """This server connection is gone before anything was sent on it: have another one."""
        self.server_lost(server)

    def server_lost(self, server: Any) -> None:
        """The server connection ended in this borrower's hands."""

    def fail(self, sqlstate: str, text: str) -> None:
        """This is the end, and why."""

    def notice_wait(self, now: float) -> None:
        """It has stood in line for long."""


class Lender:
    """Who lends server connections.

    tick: counts the uses of prepared statements
    reads_nothing: whoever borrows for the first time has to be looked at
    """

    def __init__(self) -> None:
        self.name = ""
        self.reads_nothing = False
        self.max_prepared = 0
        self.tick = 1

    def borrow(self, client: Borrower) -> Any:
        """A server connection, or None: the borrower stands in line, or was declined."""

    def settled(self, client: Borrower, lent: Any) -> None:
        """Nothing is owed and no transaction is open."""

    def unfit(self, client: Borrower, lent: Any) -> None:
        """A connection cannot carry the client's settings, but another one may."""

    def in_transaction(self, client: Borrower, lent: Any) -> None:
        """A request was answered, and a transaction is open."""

    def client_gone(self, client: Borrower) -> None:
        """A client has left, in whatever state."""
