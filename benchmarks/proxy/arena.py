"""The run: who takes part, what they share, and the rounds of one cell after the other.

All contestants run from beginning to end, and work in turn. A cell that one of them cannot do is left out for it,
with a note; one that goes wrong ends the run.
"""

import argparse
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from benchmarks.proxy import bulk, idle, pgbench, summary
from benchmarks.proxy.bulk import Transfer
from benchmarks.proxy.cells import Cell
from benchmarks.proxy.client import Failed
from benchmarks.proxy.contestants import (
    CENOTE,
    OTHER,
    PGBOUNCER,
    SERVERS,
    Cenote,
    NotThere,
    PgBouncer,
    Proxy,
    Site,
)
from benchmarks.proxy.gauge import Places
from benchmarks.proxy.pgbench import Load, Pgbench
from benchmarks.rounds import Row, Sample, order, rows
from cenote.embedded import Postgres

QUICK_ROUNDS = 3
QUICK_SECONDS = 1
ROUNDS = {"pgbench": 5, "bulk": 7, "idle": 1}
SECONDS = 2


class Arena:
    """Open it, measure cells, sum up, close it.

    rows, summary: the results; skipped: (benchmark, what, why) of what was left out
    """

    def __init__(self, server: Postgres, folder: Path, places: Places, options: argparse.Namespace) -> None:
        self.rows: list[Row] = []
        self.summary: list[Row] = []
        self.skipped: list[tuple[str, str, str]] = []
        self._options = options
        self._places = places
        self._found: dict[Cell, dict[str, list[Sample]]] = {}
        folder.chmod(0o755)  # for the account that PgBouncer runs as
        certificate, key = make_certificate(folder)
        self._site = Site(server, folder, certificate, key, places.proxy)
        self._pgbench: Pgbench = pgbench.find(server.binary("pgbench"), places.others)
        self._makers: dict[str, Callable[[], Proxy]] = {}
        if PGBOUNCER in options.contestants:
            self._makers[PGBOUNCER] = lambda: PgBouncer(self._site)
        if CENOTE in options.contestants:
            self._makers[CENOTE] = lambda: Cenote(self._site)
        if options.other:
            self._makers[OTHER] = lambda: Cenote(self._site, OTHER, options.other)
        self._proxies: dict[str, Proxy] = {}

    def open(self) -> None:
        """Start the contestants.

        :raises Failed: one of them does not start, or there is none.
        """
        for name, make in self._makers.items():
            try:
                self._proxies[name] = make()
            except NotThere as why:
                self.skipped.append(("proxy", name, str(why)))
                continue
            self._proxies[name].start()
        if not self._proxies:
            raise Failed("nobody takes part")

    def close(self) -> None:
        for proxy in self._proxies.values():
            proxy.close()

    def facts(self) -> dict[str, str]:
        """What the figures were measured on, beside the machine."""
        found = {}
        for name, proxy in self._proxies.items():
            with proxy.client(tls=True) as client:
                found[name] = f"{proxy.version}; TLS: {client.cipher}"
        found["sizes"] = f"{SERVERS} server connections for each contestant, transaction mode"
        found["log-in"] = "SCRAM-SHA-256 on both sides; TLS between client and proxy only"
        found["processors"] = str(self._places)
        programs = dict.fromkeys(program for program in (self._pgbench.plain, self._pgbench.tls) if program)
        found["pgbench"] = ", ".join(f"{_version(program)} ({program})" for program in programs)
        return found

    def measure(self, cell: Cell) -> list[Row]:
        """All rounds of one cell; the rows are kept too."""
        names = [name for name in self._proxies if self._able(cell, name)]
        if not names:
            return []
        samples: dict[str, list[Sample]] = {name: [] for name in names}
        usual = ROUNDS[cell.kind]
        rounds = self._options.rounds or (min(QUICK_ROUNDS, usual) if self._options.quick else usual)
        for number in range(rounds):
            for name in order(names, number):
                self._say(f"{cell.name}: round {number + 1} of {rounds}: {name}")
                samples[name].append(self._sample(cell, name, number))
        self._say("")
        self._found[cell] = samples
        reference = names[0]
        bounds = cell.bounds(CENOTE) if reference == PGBOUNCER else {}
        done = rows("proxy", cell.name, samples, cell.measures(samples), reference=reference, bounds=bounds)
        self.rows += done
        return done

    def sum_up(self) -> None:
        """Fill `summary`."""
        self.summary += summary.cpu_mean(self._found, list(self._proxies), next(iter(self._proxies)))
        self.summary += summary.idle_memory(self._found, CENOTE)

    def _able(self, cell: Cell, name: str) -> bool:
        why, what = "", cell.name
        proxy = self._proxies[name]
        if cell.act == "prepared" and isinstance(proxy, PgBouncer) and not proxy.has_prepared:
            what = f"prepared with {name}"
            why = f"{proxy.version} has no prepared statements in transaction mode (1.21 has)"
        elif cell.tls and cell.kind == "pgbench" and self._pgbench.tls is None:
            what = "pgbench with TLS"
            why = "the wheel's has none; install postgresql-contrib, or name one with PGBENCH=path"
        if why and ("proxy", what, why) not in self.skipped:
            self.skipped.append(("proxy", what, why))
        return not why

    def _sample(self, cell: Cell, name: str, number: int) -> Sample:
        proxy = self._proxies[name]
        if cell.kind == "idle":
            return idle.measure(self._makers[name](), cell.clients, cell.tls)
        if cell.kind == "bulk":
            mb = bulk.MB // 4 if self._options.quick else bulk.MB
            return bulk.measure(proxy, Transfer(cell.act, cell.clients, cell.tls), mb)  # type: ignore[arg-type]
        reconnect = cell.act == "connect"
        load = Load("simple" if reconnect else cell.act, cell.clients, cell.tls, reconnect)
        seconds = self._options.seconds or (QUICK_SECONDS if self._options.quick else SECONDS)

        def watched() -> AbstractContextManager[object]:
            if self._options.perf is None or number:
                return nullcontext()
            return _perf(proxy, self._options.perf / f"{cell.name}-{name}".replace("/", "-").replace(" ", "-"))

        return self._pgbench.measure(proxy, load, seconds, watched)

    def _say(self, text: str) -> None:
        """Progress: one line that is written over on a terminal, nothing elsewhere."""
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


@contextmanager
def _perf(proxy: Proxy, target: Path) -> Iterator[None]:
    """Let perf look at the proxy: its record goes to `target`.data. It costs the proxy time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    command = ["perf", "record", "-q", "-g", "-e", "cpu-clock", "-p", str(proxy.pid), "-o", f"{target}.data"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.send_signal(signal.SIGINT)  # it writes its record


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for localhost, signed by itself, and its key.

    :raises Failed: openssl is not there, or complains.
    """
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-out", str(certificate), "-keyout", str(key)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Failed("no openssl, which makes the certificate") from None
    if done.returncode != 0:
        raise Failed(f"openssl: {done.stderr.strip()}")
    key.chmod(0o644)  # PgBouncer's account reads it; it is worth nothing and gone after the run
    return certificate, key


def _version(program: Path) -> str:
    words = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.split()
    return words[2]
