"""Rounds of a closed loop: so many connections, each with one transaction after the other, for so long.

The callers live in a process of their own, so that their CPU can be told from the watcher's. Its orders go in
and its answers come out as lines of JSON; the end of its input is the order to stop: it cancels what runs on the
server, closes its connections and goes, also when whoever ordered has died. This file is the near end of the
pipe; the far end is `measure/rounds_callers.py`.
"""

import json
import math
import os
import selectors
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from cenote.errors import CenoteError, TargetUnusable
from cenote.measure.mix import Source

PROTOCOLS = ("simple", "prepared")
_STOPS_WITHIN_S = 5.0
_LATE_S = 10.0
_BUCKETS_PER_E = 50  # latencies are counted in steps of 2 %


@dataclass(frozen=True, slots=True)
class Plan:
    """What the callers are to run.

    definitions: variables given from outside
    protocol: "simple" puts values into the text, "prepared" sends a prepared statement and its values
    application: application_name of the sessions
    deadline_s: on the monotonic clock; what runs then is cancelled
    """

    dsn: str
    sources: Sequence[Source]
    definitions: dict[str, int | float]
    protocol: str
    application: str
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Round:
    """What one round gave.

    seconds: counted, after `settle` seconds that were not
    transactions: ended well within them
    failed: transactions that the server refused, by what it said; they are rolled back and not tried again
    latencies: how many transactions were how slow, see `latency_s`
    cpu_s, elapsed_s: of the callers' process, from the first to the last statement
    """

    connections: int
    seconds: float
    transactions: int
    failed: dict[str, int]
    latencies: dict[int, int]
    cpu_s: float
    elapsed_s: float


class Callers:
    """The callers' process, ready to run rounds."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self._unread = b""

    def run(
        self, connections: int, seconds: float, settle_s: float, meanwhile: Callable[[], float], longest_s: float
    ) -> Round:
        """One round; opens connections that are still missing.

        :param meanwhile: called again and again while it runs; says in how many seconds to call next
        :param longest_s: how long to wait for the answer
        :raises TargetUnusable: the server refused or went away
        :raises ConfigError: the server does not accept the mix
        """
        order = {"connections": connections, "seconds": seconds, "settle_s": settle_s}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: what it said last tells why
        found = self._answer(meanwhile, time.monotonic() + longest_s + _LATE_S)
        if found is None:
            raise TargetUnusable(
                f"with {connections} connections the server did not answer any more: given up. "
                "A pooler may let no more connect at once: then ask for fewer (--max)"
            )
        return found

    def _answer(self, meanwhile: Callable[[], float], deadline_s: float) -> Round | None:
        stdout = self._process.stdout
        assert stdout is not None
        call_at = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while time.monotonic() < deadline_s:
                if time.monotonic() >= call_at:
                    call_at = time.monotonic() + meanwhile()
                if not selector.select(max(0.0, call_at - time.monotonic())):
                    continue
                piece = os.read(stdout.fileno(), 1 << 16)
                if not piece:
                    raise CenoteError(f"the callers' process ended early (exit status {self._process.wait()})")
                self._unread += piece
                line, newline, rest = self._unread.partition(b"\n")
                if newline:
                    self._unread = rest
                    return _heard(json.loads(line))
        return None


@contextmanager
def callers(plan: Plan) -> Iterator[Callers]:
    """The callers' process. When the block ends nothing of it runs, here or on the server."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "cenote.measure.rounds_callers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in the terminal is for us, and we end it in order
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        # Through the pipe and not as an argument: it holds a password.
        process.stdin.write(json.dumps(asdict(plan)).encode() + b"\n")
        process.stdin.flush()
        yield Callers(process)
    finally:
        try:
            process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            process.wait(_STOPS_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _heard(message: dict[str, Any]) -> Round:
    if "unusable" in message:
        raise TargetUnusable(message["unusable"])
    figures = message["round"]
    figures["latencies"] = {int(bucket): count for bucket, count in figures["latencies"].items()}
    return Round(**figures)


def bucket(seconds: float) -> int:
    """The step of a latency."""
    return math.floor(math.log(max(seconds, 1e-6)) * _BUCKETS_PER_E)


def latency_s(counts: Counter[int], share: float) -> float | None:
    """The latency that `share` (0 to 1) of these did not exceed, to 1 %; None of none."""
    total = sum(counts.values())
    if not total:
        return None
    wanted = math.ceil(share * total)
    seen = 0
    for step in sorted(counts):
        seen += counts[step]
        if seen >= wanted:
            return math.exp((step + 0.5) / _BUCKETS_PER_E)
    return None
