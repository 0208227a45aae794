"""pgbench under a stop watch: transactions, latencies and the proxy's processor time in one window of time.

The window lies within the run, behind the log-ins: transactions are those that ended in it, by pgbench's own log
of each, and the proxy's clock is read at its two ends. So neither starting nor logging in nor hanging up is in the
figures.
"""

import math
import os
import shutil
import subprocess
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from benchmarks.proxy.client import Failed
from benchmarks.proxy.contestants import Proxy
from benchmarks.proxy.gauge import Used, gone_with_us
from benchmarks.rounds import Sample
from cenote.embedded import Postgres

_SETTLE_S = 0.2
_MARGIN_S = 0.1
_LOG_IN_S = 0.005  # of one client: a libpq without OpenSSL takes its time for SCRAM
_ATTEMPTS = (1, 2, 4)
_POLL_S = 0.005
_END_S = 30.0
_LEAST_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class Load:
    """What pgbench does: -M `mode`, or -C with a new connection for each transaction."""

    mode: str
    clients: int
    tls: bool = False
    reconnect: bool = False


@dataclass(frozen=True, slots=True)
class Pgbench:
    """The program: one for plain connections, and one that knows TLS, or None."""

    plain: Path
    tls: Path | None
    processors: set[int] | None

    def measure(
        self,
        proxy: Proxy,
        load: Load,
        seconds: int,
        watched: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Sample:
        """Run it for about so long, or for longer where the log-ins leave too little of it.

        :param watched: what else goes on in the window: a profiler
        :raises Failed: pgbench says no, or is never done with the log-ins.
        """
        # Its clock starts before the log-ins, and hundreds of them take a while.
        lasting = seconds + max(0, math.ceil(load.clients * _LOG_IN_S - _SETTLE_S / 2))
        for times in _ATTEMPTS:
            sample = self._measured(proxy, load, lasting * times, _LEAST_SHARE * seconds, watched)
            if sample is not None:
                return sample
        raise Failed(f"pgbench is busy logging in through {proxy.name} for {lasting * times} s")

    def _measured(
        self,
        proxy: Proxy,
        load: Load,
        lasting: int,
        least_s: float,
        watched: Callable[[], AbstractContextManager[object]],
    ) -> Sample | None:
        """None: the window would have been shorter than `least_s`."""
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="cenote-bench-") as folder:
            log = Path(folder) / "log"
            began = time.time()
            process = self._started(proxy, load, lasting, log)
            end = began + lasting - _MARGIN_S
            try:
                lines = _wait_for_lines(process, log, end)
                time.sleep(_SETTLE_S)
                before, opened = proxy.used(), time.time()
                if lines is None or end - opened < least_s:
                    return None
                with watched():
                    time.sleep(max(0.0, end - time.time()))
                    after, closed = proxy.used(), time.time()
                _, problems = process.communicate(timeout=_END_S)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.communicate()
            if process.returncode != 0:
                raise Failed(f"pgbench through {proxy.name}: {problems.decode(errors='replace').strip()}")
            latencies = sorted(in_window(lines.read_bytes(), opened, closed))
        if not latencies:
            raise Failed(f"pgbench through {proxy.name}: no transaction in {closed - opened:.1f} s")
        return _sample(load, latencies, closed - opened, before, after)

    def _started(self, proxy: Proxy, load: Load, lasting: int, log: Path) -> "subprocess.Popen[bytes]":
        server = proxy.site.server
        # New connections are for the one with TLS too, where it is there: its OpenSSL is quicker at SCRAM.
        program = self.tls if load.tls or (load.reconnect and self.tls) else self.plain
        assert program is not None
        where = ["-h", "127.0.0.1", "-p", str(proxy.port), "-U", server.user, server.database]
        how = ["-n", "-S", "-M", load.mode, "-c", str(load.clients), "-j", "1", "-T", str(lasting)]
        return subprocess.Popen(
            [program, *how, *(["-C"] if load.reconnect else []), "-l", f"--log-prefix={log}", *where],
            env={
                "PATH": os.environ.get("PATH", ""),
                "LC_ALL": "C",
                "PGPASSWORD": server.password,
                "PGSSLMODE": "require" if load.tls else "disable",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=gone_with_us(self.processors),  # noqa: PLW1509 - no thread runs here
        )


def fill(server: Postgres) -> None:
    """pgbench's tables, at its smallest scale: the answers come from memory.

    :raises Failed: in its words.
    """
    where = ["-h", server.host, "-p", str(server.port), "-U", server.user, server.database]
    command = [str(server.binary("pgbench")), "-i", "-q", "-s", "1", *where]
    password = {"PGPASSWORD": server.password}
    done = subprocess.run(command, env=password, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failed(f"pgbench -i: {done.stderr.strip()}")


def find(plain: Path, processors: set[int] | None) -> Pgbench:
    """`PGBENCH` for everything, else `plain`, and Debian's for TLS."""
    named = os.environ.get("PGBENCH")
    if named:
        found = shutil.which(named)
        if found is None:
            raise Failed(f"no pgbench: PGBENCH={named}")
        return Pgbench(Path(found), Path(found), processors)
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/pgbench"), key=lambda path: int(path.parts[4]))
    return Pgbench(plain, debian[-1] if debian else None, processors)


def in_window(log: bytes, opened: float, closed: float) -> list[int]:
    """The latencies, in us, of the transactions of a log that ended in a window.

    :param log: pgbench's, a line for each transaction: client, number, latency, script, seconds, microseconds
    """
    ended: list[float] = []
    latencies: list[int] = []
    for line in log.splitlines():
        words = line.split()
        ended.append(int(words[4]) + int(words[5]) / 1e6)
        latencies.append(int(words[2]))
    return latencies[bisect_left(ended, opened) : bisect_left(ended, closed)]


def quantile(ordered: Sequence[int], share: float) -> int:
    """The value that this share of all does not exceed."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def _sample(load: Load, ordered: Sequence[int], seconds: float, before: Used, after: Used) -> Sample:
    count, cpu_s = len(ordered), after.cpu_s - before.cpu_s
    found = {
        "throughput": count / seconds,
        "CPU": cpu_s / count,
        "of it user": (after.user_s - before.user_s) / count,
        "busy": cpu_s / seconds,
    }
    if not load.reconnect:  # pgbench's latency begins when the connection is there
        p50, p99 = quantile(ordered, 0.5), quantile(ordered, 0.99)
        found |= {"p50": p50 / 1e6, "p99": p99 / 1e6, "tail": p99 / p50}
    return found


def _wait_for_lines(process: "subprocess.Popen[bytes]", log: Path, deadline: float) -> Path | None:
    """Its log, once it has written to it: then every client is logged in. None: not by the deadline."""
    path = Path(f"{log}.{process.pid}")
    while not (path.exists() and path.stat().st_size):
        if process.poll() is not None:
            _, problems = process.communicate()
            raise Failed(f"pgbench: {problems.decode(errors='replace').strip()}")
        if time.time() > deadline:
            return None
        time.sleep(_POLL_S)
    return path
