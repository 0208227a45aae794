"""`python -m benchmarks`: run the benchmarks one after the other on a PostgreSQL of their own, and report.

It decides nothing about the figures: the exit code is 0 unless something breaks.
"""

import argparse
import sys
from pathlib import Path
from time import perf_counter

from benchmarks import contended, machine, one_shot, recovery, report, spike, uncontended
from benchmarks.arena import Run
from cenote.embedded import Postgres

BENCHMARKS = {module.NAME: module for module in (uncontended, contended, one_shot, recovery, spike)}


def main() -> int:
    options = _arguments()
    if options.list:
        for name, module in BENCHMARKS.items():
            print(f"{name:12} {module.TEXT}")
        return 0
    started = perf_counter()
    with Postgres(18, settings={"max_connections": 200}) as server:
        run = Run(server, options.rounds, options.quick)
        version = server.psql("SHOW server_version").strip()
        facts = machine.describe(version)
        report.print_machine(facts, sys.stdout)
        for name in options.only or BENCHMARKS:
            done, began = len(run.rows), perf_counter()
            BENCHMARKS[name].run(run)
            run.headline(f"{name}: {perf_counter() - began:.0f} s")
            report.print_rows(run.rows[done:], sys.stdout)
    for benchmark, contestant, why in run.skipped:
        print(f"left out of {benchmark}: {contestant}: {why}")
    if options.quick:
        print("A quick run is a look, not a measurement: run it in full before you believe a figure.")
    seconds = perf_counter() - started
    if options.json:
        report.write_json(options.json, facts, run.rows, run.skipped, seconds)
    print(f"{seconds:.0f} s")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Cenote against psycopg_pool, SQLAlchemy QueuePool, asyncpg.Pool and psycopg2's pool.",
    )
    parser.add_argument("--list", action="store_true", help="name the benchmarks and end")
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="run this one; may be repeated")
    parser.add_argument("--rounds", type=_positive, help="rounds of each benchmark, instead of its own number")
    parser.add_argument("--quick", action="store_true", help="few and short rounds: a look in under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


if __name__ == "__main__":  # the front's process imports this file too
    sys.exit(main())
