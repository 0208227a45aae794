"""What a pool of the proxy does besides lending: dial, ping, clean up, close, cancel. Each is a bounded task.

Every wait has a deadline, and every task ends by telling the machine what came of it, whatever happens.
"""

from __future__ import annotations

import asyncio
import contextlib
from binascii import unhexlify
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import Any

from cenote.core.machine import CLOSE, OPEN, PEEK, PING, RESET
from cenote.core.slot import Slot
from cenote.errors import ProtocolError
from cenote.proxy.asking import Guest
from cenote.proxy.auth.secrets import Secrets
from cenote.proxy.dial import DialError, send_cancel
from cenote.proxy.log import get_log
from cenote.proxy.pool import ProxyPool
from cenote.proxy.reading import read
from cenote.proxy.replies import NONE, OWN_QUERY, OWN_SYNC, QUERY, SYNC
from cenote.proxy.server import ServerConnection
from cenote.proxy.settings import AT_ONCE, TIMEOUT, UNHINDERED, conversion, put_back
from cenote.proxy.state import (
    CUSTOM_NAME,
    CUSTOMS,
    DEFAULTS,
    SEQUENCES,
    answer,
    differences,
    patient,
    question,
    version_of,
)
from cenote.proxy.target import Target
from cenote.reasons import Failure
from cenote.sql import touch
from cenote.wire import messages

log = get_log("cenote.proxy.pool")

_LET_GO_S = 5.0  # how long a server may take to let go of a closed connection
_CANCEL_S = 10.0
_LOOK_AGAIN_S = 60.0  # functions may be made past the proxy
_IN_FAILED = 0x45
_IDLE = 0x49


class Works:
    """The slow works of one pool. On the event loop."""

    def __init__(self, pool: ProxyPool, target: Target) -> None:
        self.pool = pool
        self.target = target
        self.tasks: set[asyncio.Task[None]] = set()
        self.dials: set[asyncio.Task[None]] = set()
        self.loop = asyncio.get_running_loop()
        self.timer: asyncio.TimerHandle | None = None
        self.last_error: DialError | None = None

    def start(self, what: str, slot: Slot) -> None:
        """Begin what the machine ordered."""
        slot.owed = False
        if what == OPEN:
            task = self.spawn(self._open(slot))
            self.dials.add(task)
            task.add_done_callback(self.dials.discard)
        elif what == CLOSE:
            self.spawn(self._close(slot))
        elif what == RESET:
            self.spawn(self._reset(slot))
        elif what == PING:
            self.spawn(self._ping(slot))
        elif what == PEEK:
            # What has come is read in this turn of the loop: at its end the connection is as alive as it looks.
            self.loop.call_later(0.001, self._peeked, slot)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a task to its end, and know of it meanwhile."""
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def stop(self) -> None:
        """Dial no more."""
        for task in self.dials:
            task.cancel()

    def wake(self, when: float) -> None:
        """Call the machine at `when`, unless that is arranged already."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self.loop.call_later(max(0.0, when - monotonic()), self.pool.tick_now)

    async def ended(self) -> None:
        """Wait for all tasks."""
        while self.tasks:
            await asyncio.wait(set(self.tasks))
        if self.timer is not None:
            self.timer.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("task_failed", exc_info=task.exception(), pool=self.pool.name)

    # -- opening ----------------------------------------------------------------------------------------------

    async def _open(self, slot: Slot) -> None:
        pool, machine = self.pool, self.pool.machine
        if not machine.dial_needed(slot, monotonic()):
            pool.perform()
            return
        failure = "destination"
        server: ServerConnection | None = None
        try:
            timeout = pool.options.connect_timeout
            begun = monotonic()
            server = await self._dial(timeout)
            await pool.budget.introduced(server)
            if pool.audits:
                await self._learn_defaults(server, max(0.1, timeout - (monotonic() - begun)))
            if pool.options.init_query:
                left = max(0.1, timeout - (monotonic() - begun))
                error = await self._run(server, pool.options.init_query.encode(), left)
                if error == b"":
                    text = f"init_query was not answered within connect_timeout ({timeout:g} s)"
                    raise DialError("08006", text, Failure.DESTINATION)
                if error is not None:
                    fields = messages.error_fields(error)
                    text = f"init_query failed: {fields.get('M', '')}"
                    raise DialError(fields.get("C", ""), text, Failure.PERMANENT)
                await self._learn_base(server, left)
        except DialError as error:
            if server is not None:
                server.abort()
            # Without its traceback, which would keep the connection that failed.
            self.last_error = DialError(error.sqlstate, error.message, error.failure)
            failure = str(error.failure)
            log.warning("dial_failed", pool=pool.name, failure=failure, sqlstate=error.sqlstate, error=str(error))
            if error.sqlstate == "53300":
                pool.budget.refused(pool, error.fields)
            machine.dial_failed(slot, monotonic(), failure)
            pool.perform()
            return
        except BaseException:
            machine.dial_failed(slot, monotonic(), failure)
            pool.perform()
            raise
        server.slot = slot
        slot.data = server
        slot.settings = None
        if server.parameters != pool.base:
            # A server upgraded or configured anew: new clients hear of it.
            pool.welcome.clear()
            pool.base = dict(server.parameters)
        if server.lost:
            machine.dial_failed(slot, monotonic(), "connection")
        else:
            pool.servers.add(server)
            machine.dialed(slot, monotonic())
        pool.perform()

    async def _learn_defaults(self, server: ServerConnection, timeout: float) -> None:
        """What ALTER ROLE or ALTER DATABASE gave this log-in; another one, earlier or later, may have others."""
        rows: list[bytes] = []
        error = await self._run(server, UNHINDERED + DEFAULTS, timeout, rows)
        if error == b"":
            text = f"the server did not say what the log-in begins with within {timeout:.3g} s"
            raise DialError("08006", text, Failure.DESTINATION)
        if error is None:
            with contextlib.suppress(ProtocolError):
                told = answer(rows, touch.ROLE, False, server.defaults)
                server.defaults = {**server.defaults, **told.customs, **(told.roles or {})}
                self.pool.resettable(told.customs)

    async def _learn_base(self, server: ServerConnection, timeout: float) -> None:
        """What init_query has set is the state that RESET is to return to."""
        rows: list[bytes] = []
        customs = read((self.pool.options.init_query or "").encode()).customs
        sql = question(touch.SETTINGS | touch.ROLE, True, (), customs, version_of(server.parameters))
        if await self._run(server, sql, timeout, rows) is None:
            with contextlib.suppress(ProtocolError):
                told = answer(rows, touch.SETTINGS | touch.ROLE, True, server.defaults)
                self.pool.ways.clear()
                self.pool.base_items = dict(told.items((), server.defaults))

    async def _dial(self, timeout: float) -> ServerConnection:
        secrets: Secrets = self.pool.daemon.gate.secrets
        server: ServerConnection = await secrets.dial(
            self.target, lambda: ServerConnection(self.pool), {}, timeout, self._noticed
        )
        server.defaults = {b"role": b"none", b"session_authorization": self.target.user.encode()}
        return server

    def _noticed(self, fields: dict[str, str]) -> None:
        """The server, or a login event trigger, says something to whoever logs in: nobody but us is there."""
        log.warning(
            "server_notice",
            pool=self.pool.name,
            severity=fields.get("V"),
            sqlstate=fields.get("C"),
            text=fields.get("M"),
        )

    # -- looking ----------------------------------------------------------------------------------------------

    def _peeked(self, slot: Slot) -> None:
        if slot.data.lost:
            self.pool.machine.check_failed(slot, monotonic(), "server_closed", self.pool.failure(slot.data))
        else:
            self.pool.machine.check_passed(slot, monotonic(), False)
        self.pool.perform()

    async def _ping(self, slot: Slot) -> None:
        machine = self.pool.machine
        server = slot.data
        error = await self._run(server, b";", self.pool.options.connect_timeout)
        if error is None and server.rests():
            machine.check_passed(slot, monotonic(), True)
        else:
            server.abort()
            machine.check_failed(slot, monotonic(), "check_failed", self.pool.failure(server))
        self.pool.perform()

    async def on_idle(self, work: Callable[[ServerConnection], Coroutine[Any, Any, None]]) -> bool:
        """Do something of our own on a connection that is idle; whether there was one."""
        pool = self.pool
        if not pool.machine.shelf.size():
            return False
        guest = Guest(pool, None, self.loop.create_future())
        server = guest.borrow()
        try:
            if server is None:
                if guest.declined is not None or await guest.there is not None:
                    return False
                server = guest.server
            if server is not None:
                await work(server)
            return server is not None
        finally:
            pool.client_gone(guest)

    async def _run(
        self, server: ServerConnection, sql: bytes, timeout: float, rows: list[bytes] | None = None
    ) -> bytes | None:
        """Run a query of our own: None, or the body of its error (b"" if the connection ended or time ran out)."""
        answers: list[bytes | None] = []
        if server.lost:
            return b""
        server.inject(sql, answers.append, rows)
        if not await self._quiet(server, timeout) or not answers:
            return b""
        return answers[0]

    async def _quiet(self, server: ServerConnection, timeout: float) -> bool:
        """Wait until the server owes nothing; whether that came in time."""
        deadline = monotonic() + timeout
        while server.replies.kind != NONE or server.replies.open:
            if server.lost:
                return False
            server.quiet = self.loop.create_future()
            try:
                await asyncio.wait_for(server.quiet, max(0.0, deadline - monotonic()))
            except TimeoutError:
                return False
            finally:
                server.quiet = None
        return not server.lost

    # -- cleaning up ------------------------------------------------------------------------------------------

    async def _reset(self, slot: Slot) -> None:
        """Bring back a connection that its client left in the middle of something, or that a cancel may hit."""
        pool, machine = self.pool, self.pool.machine
        server = slot.data
        clean = False
        try:
            clean = await self._cleaned(server, monotonic() + pool.options.cleanup_timeout)
        finally:
            if clean and server.rests():
                machine.reset_done(slot, monotonic())
            else:
                failure = pool.failure(server) if server.lost else "private"
                machine.reset_failed(slot, monotonic(), failure)
            pool.perform()

    async def _cleaned(self, server: ServerConnection, deadline: float) -> bool:
        if server.lost:
            return False
        if server.replies.kind != NONE:
            self.cancel(server)
        if server.copying:
            server.write(messages.copy_fail("the client has left"))
            server.copy_ended()
        if server.replies.open:
            server.sync()
        if not await self._quiet(server, deadline - monotonic()):
            return False
        if server.status != _IDLE and await self._run(server, b"ROLLBACK", deadline - monotonic()) is not None:
            return False
        while server.cancels:
            # The next borrower must not get this one's cancel.
            server.quiet = self.loop.create_future()
            try:
                await asyncio.wait_for(server.quiet, max(0.0, deadline - monotonic()))
            except TimeoutError:
                return False
            finally:
                server.quiet = None
        if self.pool.session_mode or server.unclean:
            if await self._run(server, b"DISCARD ALL", deadline - monotonic()) is not None:
                return False
            server.forget_all()
            server.unclean = False
            server.proof = -1
            server.sequenced = False
            base = [(name, value, False) for name, value in self.pool.base_items.items()]
            if (
                base
                and await self._run(server, put_back(base, server.defaults), deadline - monotonic()) is not None
            ):
                return False
            self.pool.carry(server, None)
        if server.expires:
            lasting = self.pool.lasting(server.settings)
            sql = conversion(server.settings, lasting, self.pool.base_items, self.pool.resets_to)
            if await self._run(server, sql, deadline - monotonic()) is not None:
                return False
            self.pool.carry(server, lasting)
        if server.lost or server.doubtful:
            return False
        return not server.audit or await self._audited(server, deadline)

    async def _audited(self, server: ServerConnection, deadline: float) -> bool:
        """Whether the session is what it is taken for."""
        pool = self.pool
        suspects, server.suspects = server.suspects, {}
        hints, server.hints = server.hints, set()
        server.audit = False
        if server.defines:
            server.defines = False
            pool.defined()
        if pool.customs_of != pool.definitions or monotonic() - pool.customs_at > _LOOK_AGAIN_S:
            if not await self._find_sequences(server, deadline):
                return False
            await self._find_customs(server, deadline)
        rows: list[bytes] = []
        base = pool.base_of(server)
        customs = pool.custom_names() | server.stain | {name for name in base if b"." in name}
        sql = question(touch.UNKNOWN, True, customs, hints, version_of(server.parameters), audit=True)
        if server.settings is not None and any(name == TIMEOUT for name, _ in server.settings.items):
            sql = patient(sql)
        if await self._run(server, AT_ONCE + b";" + sql, max(0.1, deadline - monotonic()), rows) is not None:
            return False
        try:
            told = answer(rows, touch.UNKNOWN, True, base)
        except ProtocolError:
            return False
        pool.audits_done += 1
        pool.had_values(told.customs)
        pool.resettable(told.defined)
        found = differences(server.settings, told.items((), base), base, told)
        if not found:
            if server.proof == pool.definitions:
                pool.audit_told([text for text, new in suspects.items() if new], False)
            return True
        pool.incidents += 1
        pool.audit_told([text for text, new in suspects.items() if new] or suspects, True)
        log.error(
            "state_leaked",
            pool=pool.name,
            server_pid=server.backend_pid,
            found=", ".join(found),
            statements="; ".join(text.decode("utf-8", "replace") for text in suspects) or "unknown",
        )
        return False

    async def _find_sequences(self, server: ServerConnection, deadline: float) -> bool:
        """Find out if the code in this database asks `currval` or `lastval`, which no client's text would show.
        Whether there was an answer."""
        rows: list[bytes] = []
        error = await self._run(server, UNHINDERED + SEQUENCES, max(0.1, deadline - monotonic()), rows)
        self.pool.minds_sequences = self.pool.minds_sequences or bool(error) or bool(rows)
        return error != b""

    async def _find_customs(self, server: ServerConnection, deadline: float) -> None:
        """Names of custom settings that the code in this database may set."""
        pool = self.pool
        rows: list[bytes] = []
        definitions = pool.definitions
        if await self._run(server, UNHINDERED + CUSTOMS, max(0.1, deadline - monotonic()), rows) is None:
            names = [unhexlify(messages.values(row)[0] or b"").lower() for row in rows]
            pool.code_customs = frozenset(name for name in names if CUSTOM_NAME.fullmatch(name))
        # Only now: who is audited meanwhile may have run what is new, and asks for itself.
        pool.customs_of, pool.customs_at = definitions, monotonic()

    async def _close(self, slot: Slot) -> None:
        """Close a connection and wait until the server has let go of it."""
        server = slot.data
        try:
            if not server.lost:
                self.cancel(server)
                server.unmute()
                server.farewell_sent(slot.reason == "unfinished")
                deadline = monotonic() + _LET_GO_S
                while not server.lost and monotonic() < deadline:
                    server.farewell = self.loop.create_future()
                    try:
                        await asyncio.wait_for(server.farewell, deadline - monotonic())
                    except TimeoutError:
                        break
        finally:
            server.abort()
            self.pool.servers.discard(server)
            slot.data = None
            self.pool.machine.closed(slot, monotonic())
            self.pool.perform()

    # -- cancels ----------------------------------------------------------------------------------------------

    def cancel(self, server: ServerConnection) -> asyncio.Task[None] | None:
        """Cancel what runs on this connection; it stays out of the pool until that cannot hit another query.

        Returns the task to wait for; None where there is nothing to cancel now.
        """
        if server.replies.kind == NONE:
            return None
        conversion = server.client.conversion if server.client is not None else None
        if conversion is not None and conversion.runs():
            # It may wait for a lock, and the client for it.
            if conversion.cancelled:
                return None
            conversion.cancelled = True
        elif server.cancels or server.replies.kind in (OWN_QUERY, OWN_SYNC):
            # One is on its way, perhaps for what was before; or ours runs, and the client's comes after.
            server.cancel_wanted = server.asked_at
            return None
        server.cancels += 1  # at once: the answer may be here before the task begins
        task = self.spawn(self._cancel(server))
        task.add_done_callback(lambda _: self._cancelled(server))
        return task

    async def _cancel(self, server: ServerConnection) -> None:
        delivered: bool | None = False
        try:
            delivered = await send_cancel(
                server.endpoint, server.backend_pid, server.backend_secret, timeout=_CANCEL_S
            )
        finally:
            self.pool.daemon.count_cancel("delivered" if delivered else "failed")
            if not delivered:
                if delivered is not None:
                    server.doubtful = True  # it may still strike: nobody else may have this connection
                log.warning("cancel_failed", pool=self.pool.name, server_pid=server.backend_pid)

    def _cancelled(self, server: ServerConnection) -> None:
        server.cancels -= 1
        if server.cancel_wanted:
            self.pool.cancel_now(server)
        if server.quiet is not None and not server.quiet.done() and not server.cancels:
            server.quiet.set_result(None)

    # -- every second -----------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """Tell those who wait for long, and end what has run or idled for too long. O(waiting + leased)"""
        pool = self.pool
        options = pool.options
        pool.listener.look(now)
        if options.wait_notice:
            for waiter in list(pool.machine.waiting):
                if now - waiter.since >= options.wait_notice:
                    waiter.data.notice_wait(now)
        for server in list(pool.servers):
            client = server.client
            if client is None:
                continue
            if server.status != _IDLE and server.replies.kind == NONE and not server.asked_at:
                limit = options.idle_transaction_timeout
                if limit and now - client.since >= limit:
                    client.fail("25P03", f"cenote: idle in transaction for longer than {limit:g} s")
            elif server.replies.kind in (QUERY, SYNC) or server.asked_at:
                limit = options.query_timeout
                if limit and server.asked_at and now - server.asked_at >= limit:
                    self.cancel(server)

    # -- words ------------------------------------------------------------------------------------------------

    def refusal(self, reason: str) -> bytes:
        """The error that says why there is no connection, with the numbers."""
        pool, machine = self.pool, self.pool.machine
        state = (
            f"{machine.leased.size}/{machine.max_size} leased, {machine.connecting.size} connecting, "
            f"{machine.waiting.size} waiting, {pool.pinned} pinned"
        )
        if machine in pool.budget.budget.hungry:
            state += f"; server {pool.budget.name}: {pool.budget.budget.used}/{pool.budget.budget.limit} used"
        name = f'cenote: pool "{pool.name}"'
        if reason in ("draining", "closed"):
            return messages.error("FATAL", "57P01", f"{name} is {reason}: no new transactions. [P2004]")
        if reason == "connect_failed" and self.last_error is not None:
            error = self.last_error
            return messages.error("ERROR", error.sqlstate or "08001", f"{name}: {error}", detail=state)
        if reason == "queue_full":
            text = f"{name}: {machine.max_waiting} clients already wait (max_waiting). [P2001]"
            hint = (
                "the server is slower than its clients ask; look at SHOW POOLS, then at max_size and max_waiting"
            )
        elif reason == "shed":
            text = f"{name}: the queue has stood for too long, so the oldest are refused (codel). [P2002]"
            hint = "the server is overloaded: retry later, with back-off"
        else:
            text = f"{name}: no server connection within {pool.acquire_timeout:g} s. [P2003]"
            hint = ""
            if self.last_error is not None and not machine.leased.size:
                text = f"{name}: no server connection within {pool.acquire_timeout:g} s: {self.last_error}"
            elif pool.pinned >= machine.max_size:
                hint = "every connection is pinned to a client: SHOW CLIENTS says to whom and why"
        return messages.error("ERROR", "53300", text, detail=state, hint=hint)

    def log_pin(self, client: Any, reason: str) -> None:
        """A client keeps its connection, and why."""
        log.info("pinned", pool=self.pool.name, client=client.address, reason=reason)

    def log_broken(self, server: ServerConnection, error: Exception) -> None:
        """A server broke the protocol."""
        log.error("server_protocol_error", pool=self.pool.name, server_pid=server.backend_pid, error=str(error))


async def parameters_for(pool: ProxyPool, settings: Any) -> dict[bytes, bytes]:
    """What the server says of its parameters to a session with these settings.

    :raises Declined: with the message that a client shall read
    """
    guest = Guest(pool, settings, asyncio.get_running_loop().create_future())
    server = guest.borrow()
    try:
        error = guest.declined
        if error is None and server is None:
            error = await guest.there
        if error is not None:
            raise Declined(error)
        assert guest.server is not None
        return dict(guest.server.parameters)
    finally:
        pool.client_gone(guest)


class Declined(Exception):
    """There is no connection; `args[0]` is the message that says why."""
