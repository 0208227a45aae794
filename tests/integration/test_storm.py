"""`cenote storm --real`: the simulation is held to real runs, and nothing is left behind."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from typer.testing import CliRunner

from cenote import embedded
from cenote.cli.app import app
from cenote.embedded import Postgres
from cenote.measure.scenario import Scenario, included
from cenote.measure.storm import Moment
from cenote.measure.storm_findings import disagreements
from cenote.measure.storm_real import Done, run_real

pytestmark = [pytest.mark.pg, pytest.mark.interpreted]
COMMAND = [sys.executable, "-m", "cenote.cli", "storm"]
ATTEMPTS = 6
"""A machine that does other work spoils a run, so one of a few has to agree."""

SESSIONS = (
    "SELECT count(*) FROM pg_stat_activity"
    " WHERE backend_type = 'client backend' AND datname = current_database() AND pid <> pg_backend_pid()"
)
VALIDATION = included()["validation"]
SLOW = replace(
    VALIDATION, costs=replace(VALIDATION.costs, wait_ms=79.0)
)  # what else the machine does matters less


def storm(*words: str) -> Any:
    """The verb, in this process."""
    return CliRunner().invoke(app, ["storm", *words])


def sessions(dsn: str) -> int:
    with psycopg.connect(dsn) as conn:
        row = conn.execute(SESSIONS).fetchone()
        assert row is not None
        return int(row[0])


def eventually(condition: Callable[[], Any], within_s: float = 20.0) -> Any:
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)
    return value


def agree(scenario: Scenario, ways: Sequence[str]) -> Done:
    for _ in range(ATTEMPTS):
        done = run_real(scenario, ways, None)
        real, simulated = (each.outcomes for each in (done.storm, done.simulated))
        found = list(disagreements(done.storm, done.simulated))
        refused = [
            (sum(a.refused.values()), sum(b.refused.values())) for a, b in zip(real, simulated, strict=True)
        ]
        if not found and all(b == pytest.approx(a, rel=0.3) for a, b in refused):
            return done
    raise AssertionError(found, refused)


def test_the_simulation_agrees_with_a_real_run_of_pools_and_proxy() -> None:
    scenario = replace(SLOW, load=replace(SLOW.load, seconds=2.0, rate=75.0))
    done = agree(scenario, ("local", "proxy"))
    for each in (*done.storm.outcomes, *done.simulated.outcomes):
        assert each.answered == each.requests
        assert each.peak <= 12


def test_the_simulation_agrees_with_a_real_run_of_pools_that_are_overrun() -> None:
    scenario = replace(
        SLOW,
        clients=replace(SLOW.clients, timeout_s=0.5),
        load=replace(SLOW.load, seconds=2.0, rate=225.0),
    )
    done = agree(scenario, ("local",))
    (real,), (simulated,) = done.storm.outcomes, done.simulated.outcomes
    for each in (real, simulated):
        assert each.refused.keys() == {"timeout"}
        assert each.answered + each.refused["timeout"] == each.requests


def test_without_a_pool_the_server_refuses_at_its_limit_in_both() -> None:
    scenario = replace(
        VALIDATION,
        clients=replace(VALIDATION.clients, timeout_s=20.0),
        load=replace(VALIDATION.load, seconds=1.0, rate=0.0, burst=150),
    )
    done = run_real(scenario, ("none",), None)
    for each in (*done.storm.outcomes, *done.simulated.outcomes):
        assert each.refused.keys() == {"too_many_connections"}
        assert each.rejected == each.refused["too_many_connections"]
        assert each.peak <= scenario.usable
        assert each.answered + each.rejected == each.requests


def test_somebodys_server_keeps_its_last_connections_whatever_the_way_and_is_left_as_it_was() -> None:
    """Of 14 there are 3 reserved, 1 is a neighbour's, 2 stay free and 1 looks on: 7 are for the storm."""
    scenario = replace(
        VALIDATION,
        clients=replace(VALIDATION.clients, instances=6, pool_size=5),
        load=replace(VALIDATION.load, seconds=0.5, rate=0.0, burst=60),
    )
    with embedded.Postgres(settings={"max_connections": 14}) as server:
        with psycopg.connect(server.dsn, autocommit=True) as neighbour:
            seen = []

            def look(_: Moment) -> None:
                row = neighbour.execute(SESSIONS).fetchone()
                assert row is not None
                seen.append(row[0])

            done = run_real(scenario, ("none", "local", "proxy"), server.dsn, look)
        direct, local, proxy = done.storm.outcomes
        assert max(seen) <= 7 + 1
        assert max(direct.peak, local.peak, proxy.peak) <= 7
        assert direct.rejected == direct.refused["too_many_connections"] > 0
        assert local.rejected > 0
        assert proxy.answered == 60
        assert all(each.peak <= 7 for each in done.simulated.outcomes)
        assert "127.0.0.1" in done.title
        eventually(lambda: sessions(server.dsn) == 0)


def test_the_verb_shows_both_and_writes_a_report(tmp_path: Path) -> None:
    report = tmp_path / "storm.html"
    words = ["validation", "--real", "--way", "local", "--set", "load.seconds=0.5"]
    ended = storm(*words, "--report", str(report))
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert "Real, on PostgreSQL 18" in ended.stdout
    assert "Simulated, with the costs of that server" in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 120
    assert report.read_text().count("<svg") == 4


def test_simulated_it_needs_no_server_and_says_what_it_did() -> None:
    ended = storm("restart", "--set", "load.seconds=8", "--json")
    assert (ended.exit_code, ended.stderr) == (0, "")
    figures = json.loads(ended.stdout)
    assert figures["ways"].keys() == {"none", "local", "budget", "proxy"}
    assert figures["scenario"]["restart"]["at_s"] == 7
    assert "cliff" in storm("--list").stdout
    shown = storm("cliff", "--set", "server.cores=3", "--show").stdout
    assert "cores = 3" in shown


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["clif"], 2, "did you mean 'cliff'"),
        (["cliff", "--set", "clients.instance=3"], 2, "did you mean 'instances'"),
        (["cliff", "--way", "pool"], 2, "use one of none, local, budget, proxy"),
        (["validation", "--real", "--way", "budget"], 2, "use one of none, local, proxy"),
        (["cliff", "--url", "postgresql://x"], 2, "a simulation needs no server"),
        (["ten-thousand", "--real"], 2, "20,000 at most"),
        (["restart", "--real"], 2, "only simulated"),
        (["validation", "--real", "--set", "clients.pool_size=101"], 2, "at most 400 connections"),
        (["cliff", "--costs", "/nowhere.json"], 2, "No such file"),
        (["cliff", "--plot", "x.gif"], 2, "must end in .png or .svg"),
        (["validation", "--real", "--url", "postgresql://nobody@127.0.0.1:1/x"], 1, "cannot measure this server"),
        (["validation", "--real", "--url", "{wrong}"], 1, "password authentication failed"),
    ],
)
def test_bad_input_gets_clear_messages(pg18: Postgres, words: list[str], status: int, said: str) -> None:
    wrong = pg18.dsn_for(password="wrong")
    ended = storm(*(word.format(wrong=wrong) for word in words))
    assert (ended.exit_code, ended.stdout) == (status, "")
    assert said in ended.stderr


def test_interrupted_it_leaves_no_session_and_no_process(database: str) -> None:
    words = ["validation", "--real", "--url", database, "--way", "local", "--set", "load.seconds=25"]
    with subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        eventually(lambda: sessions(database) >= 8)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "cenote: interrupted\n")
    eventually(lambda: sessions(database) == 0)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_however_it_ends_its_proxy_ends_too(database: str, how: signal.Signals) -> None:
    words = ["validation", "--real", "--url", database, "--way", "proxy", "--set", "load.seconds=25"]
    with subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        eventually(lambda: sessions(database) >= 8)
        started = psutil.Process(process.pid).children(recursive=True)
        assert any("serve" in each.cmdline() for each in started)
        process.send_signal(how)
        process.communicate(timeout=30)
    eventually(lambda: sessions(database) == 0)
    eventually(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in started))


def test_a_server_that_goes_away_in_the_middle_is_one_message() -> None:
    with embedded.Postgres() as server:
        words = ["validation", "--real", "--url", server.dsn, "--way", "local", "--set", "load.seconds=25"]
        with subprocess.Popen(
            [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            eventually(lambda: sessions(server.dsn) >= 8)
            server.stop("immediate")
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (1, "", 1)
    assert "the server went away in the middle" in err
