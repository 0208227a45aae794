"""`python -m benchmarks.proxy settings`: what clients with settings of their own cost each other.

Sixty-four clients of pgbench share the proxy's connections: once all with the same settings, once in twenty groups
of which each carries another value, so that a connection has to be converted whenever it goes to another group.
The contestants are the two crowds, not two proxies. It asserts nothing.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks import machine, report
from benchmarks.proxy import pgbench
from benchmarks.proxy.arena import make_certificate
from benchmarks.proxy.client import Failed
from benchmarks.proxy.contestants import SERVERS, Cenote, Proxy, Site
from benchmarks.proxy.gauge import Places, gone_with_us, open_files_to_the_limit
from benchmarks.rounds import Measure, Sample, order, rows
from cenote.embedded import Postgres

SAME, DISTINCT = "the same settings", "distinct settings"
MODES = ("simple", "extended", "prepared")
MEASURES = (Measure("transactions", "per s"), Measure("CPU", "us per transaction", 1e6))
_END_S = 30.0


def measure(proxy: Proxy, mode: str, clients: int, groups: int, setting: str, seconds: int, own: bool) -> Sample:
    """One crowd; `own`: each of its groups has a value of its own.

    :raises Failed: pgbench says no.
    """
    server = proxy.site.server
    sizes = [clients // groups + (number < clients % groups) for number in range(groups)]
    processes = []
    with ExitStack() as stack:
        before = proxy.used()
        for number, size in enumerate(sizes):
            words = ["-n", "-S", "-M", mode, "-c", str(size), "-j", "1", "-T", str(seconds)]
            where = ["-h", "127.0.0.1", "-p", str(proxy.port), "-U", server.user, server.database]
            process = subprocess.Popen(
                [str(server.binary("pgbench")), *words, *where],
                env={
                    "LC_ALL": "C",
                    "PGPASSWORD": server.password,
                    "PGSSLMODE": "disable",
                    "PGOPTIONS": f"-c {setting}={number if own else 0}",
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                preexec_fn=gone_with_us(None),  # noqa: PLW1509 - no thread runs here
            )
            stack.callback(process.kill)
            processes.append(process)
        done, rate = 0, 0.0
        for process in processes:
            said, problems = process.communicate(timeout=seconds + _END_S)
            if process.returncode != 0:
                raise Failed(f"pgbench: {problems.strip()}")
            done += int(_figure(said, "number of transactions actually processed: "))
            rate += float(_figure(said, "tps = "))
        return {"transactions": rate, "CPU": (proxy.used().cpu_s - before.cpu_s) / done}


def _figure(said: str, label: str) -> str:
    return said.partition(label)[2].split()[0]


def main(words: Sequence[str]) -> int:
    """Run it with these words of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proxy settings", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--groups", type=int, default=20, help="distinct values (default: 20)")
    parser.add_argument("--setting", default="app.tenant", help="which one (default: app.tenant)")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--python", default=sys.executable, help="the interpreter whose Cenote takes part")
    options = parser.parse_args(words)
    try:
        return _run(options)
    except Failed as problem:
        print(f"settings: {problem}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    open_files_to_the_limit()
    places = Places.chosen(False)
    with ExitStack() as stack:
        server = stack.enter_context(Postgres(18, settings={"max_connections": 100}))
        pgbench.fill(server)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm", prefix="cenote-bench-")))
        folder.chmod(0o755)
        proxy = Cenote(Site(server, folder, *make_certificate(folder), places.proxy), python=options.python)
        stack.callback(proxy.close)
        proxy.start()
        facts = machine.describe(server.psql("SHOW server_version").strip())
        report.print_machine(facts | {"proxy": f"{proxy.version}, {SERVERS} connections"}, sys.stdout)
        for mode in options.modes:
            samples: dict[str, list[Sample]] = {SAME: [], DISTINCT: []}
            for number in range(options.rounds):
                for name in order(list(samples), number):
                    crowd = (options.clients, options.groups, options.setting, options.seconds)
                    samples[name].append(measure(proxy, mode, *crowd, own=name == DISTINCT))
            group = f"{mode}: {options.clients} clients, {options.groups} values of {options.setting}"
            report.print_rows(rows("settings", group, samples, MEASURES, reference=SAME, bounds={}), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
