"""The benchmarks run: a quick one, for its shape. What the figures are is no business of a test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.pg


def test_a_quick_run_measures_every_contestant_or_says_which_package_is_missing(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = ["--quick", "--only", "uncontended", "--rounds", "2", "--json", str(result)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text())

    assert {"CPUs", "load average", "Python", "packages", "Cenote is"} <= found["machine"].keys()
    measured = {row["contestant"] for row in found["rows"]}
    left_out = {note["contestant"] for note in found["skipped"]}
    assert measured | left_out == {
        "cenote.Pool, psycopg",
        "cenote.Pool, psycopg2",
        "psycopg_pool",
        "SQLAlchemy QueuePool",
        "psycopg2 ThreadedConnectionPool",
        "cenote.AsyncPool, asyncpg",
        "cenote.AsyncPool, psycopg",
        "asyncpg.Pool",
        "psycopg_pool, asyncio",
    }
    assert {"cenote.Pool, psycopg", "cenote.AsyncPool, asyncpg"} <= measured
    for row in found["rows"]:
        value = row["value"]
        assert 0 < value["low"] <= value["median"] <= value["high"]
        assert row["rounds"] == 2
    for note in found["skipped"]:
        assert note["why"]
        assert f"left out of uncontended: {note['contestant']}" in done.stdout


def test_the_list_names_every_benchmark_and_measures_nothing() -> None:
    command = [sys.executable, "-m", "benchmarks", "--list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == ["uncontended", "contended", "one_shot", "recovery", "spike"]
