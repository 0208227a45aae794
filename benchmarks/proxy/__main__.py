"""`python -m benchmarks.proxy`: Cenote's proxy and PgBouncer in alternation on one PostgreSQL, and the report.

It decides nothing about the figures: the exit code is 0 unless something breaks. Whatever it starts ends with it.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter

from benchmarks import machine, report
from benchmarks.proxy import bulk, cells, pgbench, settings, storm
from benchmarks.proxy.arena import Arena
from benchmarks.proxy.cells import Cell
from benchmarks.proxy.client import Failed
from benchmarks.proxy.contestants import CENOTE, PGBOUNCER, SERVERS
from benchmarks.proxy.gauge import Places, open_files_to_the_limit
from cenote.embedded import Postgres

QUICK = ("simple/8", "extended/64", "simple/64/tls", "connect/8", "select/4", "copy/4", "idle/5000")


def main() -> int:
    if sys.argv[1:2] == ["storm"]:
        return storm.main(sys.argv[2:])
    if sys.argv[1:2] == ["settings"]:
        return settings.main(sys.argv[2:])
    options = _arguments()
    if options.list:
        for cell in cells.every_cell():
            print(cell.name)
        return 0
    try:
        wanted = cells.chosen(options.only or (QUICK if options.quick else ["*"]))
        signal.signal(signal.SIGTERM, _end)
        return _measure(options, wanted)
    except (Failed, ValueError) as problem:
        print(f"python -m benchmarks.proxy: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _measure(options: argparse.Namespace, wanted: Sequence[Cell]) -> int:
    started = perf_counter()
    places = Places.chosen(options.pin)
    open_files_to_the_limit()
    with _server(places) as server, tempfile.TemporaryDirectory(dir="/dev/shm", prefix="cenote-bench-") as folder:
        with ExitStack() as stack:
            arena = Arena(server, Path(folder), places, options)
            stack.callback(arena.close)
            arena.open()
            facts = machine.describe(server.psql("SHOW server_version").strip())
            facts |= {"CPUs": str(places.count)} | arena.facts()
            report.print_machine(facts, sys.stdout)
            for cell in wanted:
                report.print_rows(arena.measure(cell), sys.stdout)
            arena.sum_up()
    for _, what, why in arena.skipped:
        print(f"left out: {what}: {why}")
    report.print_rows(arena.summary, sys.stdout)
    if options.quick:
        print("A quick run is a look, not a measurement: run it in full before you believe a figure.")
    seconds = perf_counter() - started
    if options.json:
        report.write_json(options.json, facts, [*arena.rows, *arena.summary], arena.skipped, seconds)
    print(f"{seconds:.0f} s")
    return 0


@contextmanager
def _server(places: Places) -> Iterator[Postgres]:
    """A PostgreSQL with pgbench's tables, and its processes where they belong."""
    with places.for_others(), Postgres(18, settings={"max_connections": 100}) as server:
        bulk.make_table(server)
        pgbench.fill(server)
        yield server


def _end(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proxy",
        description=f"Cenote's proxy and PgBouncer, {SERVERS} server connections each, in alternation.",
    )
    parser.add_argument("--list", action="store_true", help="name the cells and end")
    parser.add_argument(
        "--only",
        "--cells",
        dest="only",
        nargs="+",
        metavar="CELL",
        help="these cells: names, patterns such as 'simple/*', or `budget`: those of the promised mean",
    )
    parser.add_argument("--rounds", type=_positive, help="rounds of each cell, instead of its own number")
    parser.add_argument("--seconds", type=_positive, help="how long pgbench runs for each figure (default: 2)")
    parser.add_argument("--quick", action="store_true", help="a few cells, short: a look in a minute")
    parser.add_argument(
        "--pin", action="store_true", help="a processor for the proxy, the rest for everything else"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=(PGBOUNCER, CENOTE),
        default=(PGBOUNCER, CENOTE),
        help="who takes part",
    )
    parser.add_argument("--other", metavar="PYTHON", help="a second Cenote, of another environment's interpreter")
    parser.add_argument("--perf", type=Path, metavar="FOLDER", help="perf record in each cell's first round")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
