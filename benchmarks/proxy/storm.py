"""`python -m benchmarks.proxy storm`: a thousand log-ins at once, and what those who are in already notice of it.

pgbench asks at a fixed rate and measures each answer from the moment it should have asked, so that a pause of the
proxy is in the figures as long as it was. Meanwhile the crowd comes: SCRAM with keys that were derived once, in
one thread, so that it is the proxy that works and not the machine for its clients. It asserts nothing.
"""

import argparse
import asyncio
import math
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import machine, report
from benchmarks.proxy import pgbench
from benchmarks.proxy.arena import make_certificate
from benchmarks.proxy.client import Failed
from benchmarks.proxy.contestants import Cenote, PgBouncer, Proxy, Site
from benchmarks.proxy.gauge import Places, gone_with_us, open_files_to_the_limit
from benchmarks.rounds import Measure, Sample, order, rows
from cenote.embedded import Postgres
from cenote.wire import messages, scram

#: More than any storm brings: nobody waits for a turn.
NO_LIMIT = 1e6
QUERIES = 8  # clients of pgbench
_SETTLE_S, _CALM_S, _END_S = 1.0, 2.0, 30.0
_PATIENCE_S = 60.0  # for all to be in

MEASURES = (
    Measure("p50 before", "ms", 1e3),
    Measure("p99 before", "ms", 1e3),
    Measure("p50 during", "ms", 1e3),
    Measure("p99 during", "ms", 1e3),
    Measure("worst during", "ms", 1e3),
    Measure("p50 after", "ms", 1e3),
    Measure("p99 after", "ms", 1e3),
    Measure("all in", "s"),
    Measure("CPU", "us per log-in", 1e6),
)


class Limited(Cenote):
    """Cenote with another `login_rate`; None: its own default."""

    def __init__(self, site: Site, rate: float | None, python: str) -> None:
        self._rate = rate
        super().__init__(site, "Cenote" if rate is None else f"Cenote {rate:g} per s", python)

    def _prepared(self) -> tuple[Sequence[str], bool]:
        prepared = super()._prepared()
        if self._rate is not None:
            path = self._folder / "cenote.toml"
            path.write_text(path.read_text().replace("[listen]\n", f"[listen]\nlogin_rate = {self._rate}\n"))
        return prepared


@dataclass(frozen=True, slots=True)
class Door:
    """Where the crowd comes in, and as whom. `keys` were derived once."""

    port: int
    user: str
    database: str
    keys: scram.Keys
    tls: ssl.SSLContext | None

    @classmethod
    def of(cls, proxy: Proxy, tls: bool) -> "Door":
        server = proxy.site.server
        verifier = scram.Verifier.parse(proxy.site.verifier)
        keys = scram.Keys.of_password(server.password, verifier.salt, verifier.iterations)
        context = None
        if tls:
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            context.set_alpn_protocols(["postgresql"])  # direct TLS
        return cls(proxy.port, server.user, server.database, keys, context)


class Comer(asyncio.Protocol):
    """One log-in, from the startup packet to ReadyForQuery; then it only stays. `inside` says how it ended."""

    def __init__(self, door: Door) -> None:
        self.inside: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._door = door
        self._came = b""
        self._exchange: scram.ClientExchange | None = None
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(messages.startup([("user", self._door.user), ("database", self._door.database)]))

    def data_received(self, data: bytes) -> None:
        self._came += data
        while len(self._came) >= 5:
            end = 1 + int.from_bytes(self._came[1:5], "big")
            if len(self._came) < end:
                return
            kind, body, self._came = self._came[:1], self._came[5:end], self._came[end:]
            if kind == b"R":
                self._answer(int.from_bytes(body[:4], "big"), body[4:])
            elif kind == b"Z":
                self._end(None)
            elif kind == b"E":
                self._end(Failed(messages.error_fields(body).get("M", "refused without a word")))

    def connection_lost(self, error: Exception | None) -> None:
        self._end(Failed(f"the connection was lost: {error}"))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _answer(self, asked: int, data: bytes) -> None:
        if asked == 10:
            self._exchange = scram.ClientExchange([word.decode() for word in data.split(b"\0") if word])
            first = self._exchange.first()
            chosen = self._exchange.mechanism.encode() + b"\0" + len(first).to_bytes(4, "big")
            self._transport.write(messages.password(chosen + first))
        elif asked == 11 and self._exchange is not None:
            self._exchange.challenge(data)
            self._transport.write(messages.password(self._exchange.final(self._door.keys)))

    def _end(self, error: Failed | None) -> None:
        if not self.inside.done():
            if error is None:
                self.inside.set_result(None)
            else:
                self.inside.set_exception(error)


async def storm(door: Door, crowd: int) -> float:
    """So many log-ins as fast as they come; returns after how many seconds all were in, and sends them home.

    :raises Failed: one of them was refused, or they are not in within a minute.
    """
    loop = asyncio.get_running_loop()
    comers: list[Comer] = []

    async def come() -> None:
        comer = Comer(door)
        comers.append(comer)
        await loop.create_connection(lambda: comer, "127.0.0.1", door.port, ssl=door.tls)
        await comer.inside

    began = time.perf_counter()
    try:
        async with asyncio.timeout(_PATIENCE_S), asyncio.TaskGroup() as group:
            for _ in range(crowd):
                group.create_task(come())
        return time.perf_counter() - began
    except* Failed as refused:
        raise refused.exceptions[0] from None
    except* TimeoutError:
        raise Failed(f"they are not in within {_PATIENCE_S:g} s") from None
    finally:
        for comer in comers:
            comer.close()
        await asyncio.gather(*(comer.inside for comer in comers), return_exceptions=True)


def measure(proxy: Proxy, crowd: int, rate: int, patience_s: float, tls: bool) -> Sample:
    """One storm while pgbench asks `rate` times a second.

    :param patience_s: how long the storm may take, to know how long pgbench has to run
    """
    door = Door.of(proxy, tls)
    lasting = math.ceil(_SETTLE_S + 2 * _CALM_S + patience_s + 1)
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="cenote-storm-") as folder:
        log, began = Path(folder) / "log", time.time()
        with _asking(proxy, rate, lasting, log) as process:
            time.sleep(_SETTLE_S)
            quiet, opened = proxy.used(), time.time()
            time.sleep(_CALM_S)
            before, breaks = proxy.used(), time.time()
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                all_in_s = runner.run(storm(door, crowd))
            after, over = proxy.used(), time.time()
            if over + _CALM_S > began + lasting:
                raise Failed(f"the storm took {over - breaks:.1f} s, more than {patience_s:.1f} s")
            _, problems = process.communicate(timeout=lasting + _END_S)
            if process.returncode != 0:
                raise Failed(f"pgbench: {problems.decode(errors='replace').strip()}")
            lines = Path(f"{log}.{process.pid}").read_bytes()
    asking_s = (before.cpu_s - quiet.cpu_s) / (breaks - opened) * (over - breaks)
    found = {"all in": all_in_s, "CPU": (after.cpu_s - before.cpu_s - asking_s) / crowd}
    # The first moment after the storm is spent on goodbyes.
    windows = {
        "before": (opened, breaks),
        "during": (breaks, breaks + all_in_s),
        "after": (over + 0.5, began + lasting),
    }
    for name, window in windows.items():
        ordered = sorted(pgbench.in_window(lines, *window))
        if not ordered:
            raise Failed(f"no query was answered {name} the storm")
        found[f"p50 {name}"] = pgbench.quantile(ordered, 0.5) / 1e6
        found[f"p99 {name}"] = pgbench.quantile(ordered, 0.99) / 1e6
        found[f"worst {name}"] = ordered[-1] / 1e6
    return found


def _asking(proxy: Proxy, rate: int, lasting: int, log: Path) -> "_Asking":
    server = proxy.site.server
    where = ["-h", "127.0.0.1", "-p", str(proxy.port), "-U", server.user, server.database]
    how = [
        "-n",
        "-S",
        "-c",
        str(QUERIES),
        "-j",
        "1",
        "-T",
        str(lasting),
        "-R",
        str(rate),
        "-l",
        f"--log-prefix={log}",
    ]
    return _Asking(
        [str(server.binary("pgbench")), *how, *where],
        env={"LC_ALL": "C", "PGPASSWORD": server.password, "PGSSLMODE": "disable"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=gone_with_us(None),
    )


class _Asking(subprocess.Popen[bytes]):
    """pgbench, gone at the end of the block."""

    def __exit__(self, *of: Any) -> None:
        if self.poll() is None:
            self.kill()
        super().__exit__(*of)


def main(words: Sequence[str]) -> int:
    """Run it with these words of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proxy storm", description=__doc__.splitlines()[0])
    parser.add_argument("--crowd", type=int, default=1000, help="log-ins at once (default: 1000)")
    parser.add_argument(
        "--rates", type=float, nargs="*", default=[NO_LIMIT], help="login_rate, beside the default"
    )
    parser.add_argument("--queries", type=int, default=1000, help="of pgbench in a second (default: 1000)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tls", action="store_true", help="the crowd comes over TLS")
    parser.add_argument("--pgbouncer", action="store_true", help="PgBouncer takes part")
    parser.add_argument("--pin", action="store_true", help="a processor for the proxy")
    parser.add_argument("--python", default=sys.executable, help="the interpreter whose Cenote takes part")
    options = parser.parse_args(words)
    try:
        return _run(options)
    except Failed as problem:
        print(f"storm: {problem}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    places = Places.chosen(options.pin)
    open_files_to_the_limit()
    with ExitStack() as stack:
        stack.enter_context(places.for_others())
        server = stack.enter_context(Postgres(18, settings={"max_connections": 100}))
        pgbench.fill(server)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm", prefix="cenote-bench-")))
        folder.chmod(0o755)
        site = Site(server, folder, *make_certificate(folder), places.proxy)
        proxies: list[Proxy] = [Limited(site, None, options.python)]
        proxies += [Limited(site, rate, options.python) for rate in options.rates]
        if options.pgbouncer:
            proxies.append(PgBouncer(site))
        for proxy in proxies:
            stack.callback(proxy.close)
            proxy.start()
        facts = machine.describe(server.psql("SHOW server_version").strip()) | {"processors": str(places)}
        report.print_machine(facts | {proxy.name: proxy.version for proxy in proxies}, sys.stdout)
        samples: dict[str, list[Sample]] = {proxy.name: [] for proxy in proxies}
        by_name = {proxy.name: proxy for proxy in proxies}
        for number in range(options.rounds):
            for name in order(list(by_name), number):
                slowest = min([rate for rate in options.rates if f"{rate:g}" in name] or [200.0])
                patience_s = max(4.0, 1.5 * options.crowd / slowest)
                samples[name].append(
                    measure(by_name[name], options.crowd, options.queries, patience_s, options.tls)
                )
        group = f"{options.crowd} log-ins{' over TLS' if options.tls else ''}, {options.queries} queries per s"
        report.print_rows(
            rows("storm", group, samples, MEASURES, reference=proxies[0].name, bounds={}), sys.stdout
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
