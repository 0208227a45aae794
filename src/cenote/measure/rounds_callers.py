"""The callers of a closed loop: one statement outstanding on each connection, the next as soon as it is answered.

Run as `python -m cenote.measure.rounds_callers` by `measure/rounds.py`. It drives libpq itself, with one epoll for
all connections: a driver on top, or a thread for each, would take more CPU than a small query does and measure
itself. Connections stay open from round to round, so a round is never about opening them.
"""

import heapq
import json
import os
import random
import select
import sys
from collections import Counter
from time import monotonic, process_time
from typing import Any

import psycopg
from psycopg import pq

from cenote.errors import CenoteError
from cenote.measure.expression import BadExpression, Variables
from cenote.measure.mix import Mix, Script, Set, Sleep, Source, Statement, parse_mix
from cenote.measure.rounds import Plan, Round, bucket
from cenote.measure.target import CONNECT_TIMEOUT_S, one_line

_GOOD = frozenset({pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK, pq.ExecStatus.EMPTY_QUERY})
_COPY = frozenset({pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_BOTH})
_RETRIABLE = ("40001", "40P01")  # what a server does to concurrent transactions: counted, and the loop goes on
_CANCELLED = "57014"
_SEED = 53300


class Unusable(CenoteError):
    """The measurement cannot go on; the words are for the user."""


class Stop(Exception):
    """Nobody wants any more."""


class Caller:
    """One connection and the transaction it is in."""

    def __init__(self, conn: "psycopg.Connection[Any]", mix: Mix, variables: Variables, prepared: bool) -> None:
        self.fd = conn.fileno()
        self.script: Script = mix.scripts[0]
        self.busy = False
        self.heard = False
        self.failed = ""
        self.since = 0.0
        self._conn = conn
        self._libpq: Any = conn.pgconn
        self._mix = mix
        self._chance = random.Random(_SEED + int(variables["client_id"]))
        self._given = variables
        self._variables: Variables = {}
        self._at = 0
        self._names: dict[Statement, bytes] | None = {} if prepared else None

    def begin(self, now: float) -> float:
        """The next transaction; what `go_on` says."""
        self.since = now
        self.busy = True
        self.failed = ""
        self.script = self._mix.draw(self._chance)
        self._variables = dict(self._given)
        self._at = 0
        return self.go_on()

    def go_on(self) -> float:
        """Send the next statement.

        Returns 0 when one was sent, a time in seconds to sleep before this is called again, or -1 when the
        transaction has ended.
        """
        steps = self.script.steps
        while self._at < len(steps):
            step = steps[self._at]
            self._at += 1
            if isinstance(step, Set):
                self._variables[step.name] = step.value(self._variables, self._chance)
            elif isinstance(step, Sleep):
                return max(1e-6, float(step.amount(self._variables, self._chance)) * step.unit_s)
            elif self._names is None:
                self._libpq.send_query(step.simple(self._variables))
                return 0.0
            else:
                self._libpq.send_query_prepared(self._name(step, self._names), step.values(self._variables))
                return 0.0
        if self._libpq.transaction_status != pq.TransactionStatus.IDLE:
            # A script that ends within a transaction, or that failed in one, must not hold it into the next.
            self._at = len(steps)
            self._libpq.send_query(b"ROLLBACK")
            return 0.0
        self.busy = False
        return -1.0

    def answered(self) -> bool:
        """Take in what has come; whether the statement has ended."""
        libpq = self._libpq
        libpq.consume_input()
        while not libpq.is_busy():
            result = libpq.get_result()
            if result is None:
                self.heard = True
                return True
            if result.status not in _GOOD:
                self._refused(result)
        return False

    def _refused(self, result: Any) -> None:
        if result.status in _COPY:
            raise Unusable(f"{self.script.name}: COPY cannot be measured here")
        code = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
        words = (result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or b"").decode(errors="replace")
        if not code or (code[:2] in {"57", "58", "08"} and code != _CANCELLED):
            raise Unusable(f"the server ended it: {words or one_line(Exception(libpq_words(self._libpq)))}")
        if code not in _RETRIABLE and code != _CANCELLED:
            raise Unusable(f"{self.script.name} fails on the server: {words} (SQLSTATE {code})")
        self.failed = words
        self._at = len(self.script.steps)

    def _name(self, statement: Statement, names: dict[Statement, bytes]) -> bytes:
        """Its prepared statement, made when it is first needed: others before it may make what it needs."""
        name = names.get(statement)
        if name is None:
            name = names[statement] = f"cenote_{len(names)}".encode()
            result = self._libpq.prepare(name, statement.prepared())
            if result.status not in _GOOD:
                self._refused(result)
        return name

    def stop(self) -> None:
        """Cancel what runs, and close."""
        if self.busy:
            try:
                self._conn.cancel_safe(timeout=2.0)
            except psycopg.Error:
                pass
        self._conn.close()


def libpq_words(libpq: Any) -> str:
    """What libpq says of its last trouble."""
    return bytes(libpq.error_message).decode(errors="replace") or "the connection was closed"


class Loop:
    """All callers, on one epoll."""

    def __init__(self, plan: Plan, mix: Mix) -> None:
        self._plan = plan
        self._mix = mix
        self._callers: list[Caller] = []
        self._by_fd: dict[int, Caller] = {}
        self._epoll = select.epoll()
        self._epoll.register(sys.stdin.fileno(), select.EPOLLIN)
        self._sleeping: list[tuple[float, int, Caller]] = []

    def open(self, connections: int) -> None:
        """Open those that are missing."""
        plan = self._plan
        while len(self._callers) < connections:
            number = len(self._callers)
            conn = psycopg.connect(
                plan.dsn,
                autocommit=True,
                connect_timeout=CONNECT_TIMEOUT_S,
                application_name=plan.application,
            )
            variables: Variables = {"scale": 1, **plan.definitions, "client_id": number}
            caller = Caller(conn, self._mix, variables, plan.protocol == "prepared")
            self._callers.append(caller)
            self._by_fd[caller.fd] = caller
            self._epoll.register(caller.fd, select.EPOLLIN)

    def round(self, connections: int, seconds: float, settle_s: float) -> Round:
        """Run `connections` of them and count."""
        self.open(connections)
        began, cpu = monotonic(), process_time()
        counts_from, ends = began + settle_s, began + settle_s + seconds
        latencies: Counter[int] = Counter()
        failed: Counter[str] = Counter()
        active = 0
        for caller in self._callers[:connections]:
            active += self._step(caller, caller.begin(monotonic()))
        while active:
            self._must_be_in_time(connections)
            for caller in self._ready():
                wait = caller.go_on()
                if self._step(caller, wait):
                    continue
                now = monotonic()
                if counts_from <= now < ends:
                    if caller.failed:
                        failed[caller.failed] += 1
                    else:
                        latencies[bucket(now - caller.since)] += 1
                if now < ends:
                    self._step(caller, caller.begin(now))
                else:
                    active -= 1
        return Round(
            connections=connections,
            seconds=seconds,
            transactions=sum(latencies.values()),
            failed=dict(failed),
            latencies=dict(latencies),
            cpu_s=process_time() - cpu,
            elapsed_s=monotonic() - began,
        )

    def _step(self, caller: Caller, wait: float) -> bool:
        """Note what a caller waits for; whether its transaction goes on."""
        if wait > 0:
            heapq.heappush(self._sleeping, (monotonic() + wait, caller.fd, caller))
        return wait >= 0

    def _ready(self) -> list[Caller]:
        """Those that may go on, after waiting for one."""
        timeout = 0.1
        if self._sleeping:
            timeout = min(timeout, max(0.0, self._sleeping[0][0] - monotonic()))
        ready = []
        for fd, _ in self._epoll.poll(timeout):
            caller = self._by_fd.get(fd)
            if caller is None:
                raise Stop  # the near end orders nothing in the middle of a round: its end is closed
            if caller.answered():
                ready.append(caller)
        while self._sleeping and self._sleeping[0][0] <= monotonic():
            ready.append(heapq.heappop(self._sleeping)[2])
        return ready

    def _must_be_in_time(self, connections: int) -> None:
        if monotonic() > self._plan.deadline_s:
            heard = sum(caller.heard for caller in self._callers[:connections])
            if 0 < heard < connections:
                raise Unusable(
                    f"{connections - heard} of {connections} connections never had an answer: if a pooler answers "
                    f"there, it lets {heard} work at once, and more (--max) cannot be measured through it"
                )
            raise Unusable(
                "the time was over before every transaction had ended: give it more (--seconds), or ask for a "
                "shorter transaction"
            )

    def close(self) -> None:
        """Leave nothing on the server."""
        for caller in self._callers:
            caller.stop()
        self._epoll.close()


def _serve(loop: Loop) -> None:
    """Run the rounds that are ordered until there are no more orders."""
    stdin = sys.stdin.fileno()
    unread = b""
    while piece := os.read(stdin, 1 << 12):
        unread += piece
        while b"\n" in unread:
            line, _, unread = unread.partition(b"\n")
            done = loop.round(**json.loads(line))
            _say({"round": {name: getattr(done, name) for name in Round.__dataclass_fields__}})


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def _plan() -> Plan:
    """The first line of standard input, read without a buffer that would hide the orders behind it from epoll."""
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(sys.stdin.fileno(), 1)
    words = json.loads(line)
    words["sources"] = [Source(**source) for source in words["sources"]]
    return Plan(**words)


def main() -> None:
    """Read a plan and orders from standard input, carry them out, write what came of them."""
    plan = _plan()
    loop = Loop(plan, parse_mix(plan.sources, tuple(plan.definitions)))
    try:
        _serve(loop)
    except (Stop, BrokenPipeError):
        pass  # whoever started us has gone, and nobody wants to know
    except Unusable as error:
        _say({"unusable": str(error).removesuffix(f" [{error.code}]")})
    except BadExpression as error:
        _say({"unusable": f"a \\set cannot be computed: {error}"})
    except psycopg.Error as error:
        _say({"unusable": f"the server went away or refused a connection: {one_line(error)}"})
    finally:
        loop.close()


if __name__ == "__main__":
    main()
