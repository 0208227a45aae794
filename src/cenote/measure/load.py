"""What the callers of an experiment are told and what they report, and the process they run in.

Callers live in a process of their own, so that whoever watches them takes none of their time and their CPU
can be told from his. The plan goes in as one line of JSON; counts and at last the report come out. This file
is the near end of that pipe, needs no driver, and calls nobody; the far end is `measure/callers.py`.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

ROWS = 100_000
"""As many accounts as pgbench makes at scale 1."""

SQL = "SELECT abalance FROM accounts WHERE aid = %s"
"""A look-up by primary key, as in `pgbench --select-only`; `balance` knows the right answer."""

MAKE_TABLE = f"""
CREATE TABLE accounts (aid int NOT NULL, bid int NOT NULL, abalance int NOT NULL, filler char(84) NOT NULL);
INSERT INTO accounts SELECT aid, 1, aid * 7919 % 100003, '' FROM generate_series(1, {ROWS}) AS aid;
ALTER TABLE accounts ADD PRIMARY KEY (aid);
VACUUM ANALYZE accounts;
GRANT SELECT ON accounts TO PUBLIC;
"""

_SPARE_FILES = 64


def balance(account: int) -> int:
    """What the table holds for an account."""
    return account * 7919 % 100003


def files_needed(clients: int) -> int:
    """How many descriptors a process with that many callers may have open."""
    return clients + _SPARE_FILES


@dataclass(frozen=True, slots=True)
class Plan:
    """What the callers do.

    way: "direct" opens a connection for each request, "pool" borrows one, "kept" has one for each caller
    requests: of each caller, one after the other
    every_s: all callers ask at the same moment, again after this; one that still waits then asks when it is free
    bound_s: what is unfinished then is given up
    """

    way: str
    dsn: str
    clients: int
    requests: int
    every_s: float
    bound_s: float
    pool_size: int


@dataclass(slots=True)
class Counts:
    """How many requests ended how, up to now."""

    answered: int = 0
    refused: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """What the callers saw.

    latencies_s: of the answered requests, from asking to the answer, whatever they waited for; sorted
    refused, failed: how many, by what was said
    unfinished: given up at the bound, or never begun
    opened: server connections opened
    started_s, seconds: on the monotonic clock, until the last request ended
    cpu_s: of the callers' process in that time
    """

    latencies_s: list[float]
    refused: dict[str, int]
    failed: dict[str, int]
    unfinished: int
    opened: int
    started_s: float
    seconds: float
    cpu_s: float


@contextmanager
def callers(plan: Plan) -> Iterator["subprocess.Popen[bytes]"]:
    """The callers' process, at work; `heard` understands what it writes. It does not outlive the block."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "cenote.measure.callers"],  # -P: no modules from where we happen to be
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in the terminal is for us, and we end it
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdin, process.stdout:
            # Through the pipe and not as an argument: it holds a password.
            process.stdin.write(json.dumps(asdict(plan)).encode() + b"\n")
            process.stdin.flush()
            yield process
            process.wait()
    finally:
        process.kill()
        process.wait()


def said(message: Counts | Report) -> str:
    """One line of what a callers' process writes."""
    return json.dumps({"counts" if isinstance(message, Counts) else "report": asdict(message)})


def heard(line: bytes) -> Counts | Report:
    """The opposite of `said`."""
    message = json.loads(line)
    return Report(**message["report"]) if "report" in message else Counts(**message["counts"])
