"""Lines of the log: one for each event, machine-readable, bounded in a storm, and without secrets."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.proxy import log as module
from cenote.proxy.log import EVENTS, QUIET_S, Damper, Log, flush_logs, get_log, markdown, start_logging

ROOT = Path(__file__).parents[2]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Where the lines go; what a test sets is undone."""
    logger = logging.getLogger("cenote")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield io.StringIO()
    logger.handlers[:], logger.level, logger.propagate = before[0], before[1], before[2]
    logger.setLevel(before[1])


def lines(stream: io.StringIO) -> list[str]:
    """Without the time."""
    found = stream.getvalue().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ", line) for line in found), found
    return [line.split(" ", 1)[1] for line in found]


def test_an_event_is_a_line_of_time_level_name_and_fields(stream: io.StringIO, clock: Clock) -> None:
    start_logging("info", "text", stream)
    Log("cenote.proxy", clock).warning(
        "dial_failed", pool="orders/app", failure="destination", size=3, after_s=1.23456789
    )
    assert lines(stream) == ["warning dial_failed pool=orders/app failure=destination size=3 after_s=1.234568"]


def test_in_json_an_event_is_an_object_on_one_line_with_numbers_as_numbers(
    stream: io.StringIO, clock: Clock
) -> None:
    start_logging("info", "json", stream)
    Log("cenote.proxy", clock).info("draining", clients=12, timeout_s=0.5, text='a "b"\nc')
    told = json.loads(stream.getvalue())
    assert stream.getvalue().count("\n") == 1
    assert list(told)[:4] == ["time", "level", "logger", "event"]
    assert (told["level"], told["event"], told["clients"], told["timeout_s"]) == ("info", "draining", 12, 0.5)
    assert told["text"] == 'a "b"\nc'


def test_a_field_cannot_pass_for_the_event_or_its_time(stream: io.StringIO, clock: Clock) -> None:
    start_logging("info", "json", stream)
    Log("cenote.proxy", clock).info("draining", time="never", level="quiet")
    told = json.loads(stream.getvalue())
    assert told["level"] == "info"
    assert told["time"] != "never"


def test_below_its_level_nothing_is_written(stream: io.StringIO, clock: Clock) -> None:
    start_logging("warning", "text", stream)
    log = Log("cenote.proxy", clock)
    log.debug("started")
    log.info("started")
    log.error("task_failed")
    assert lines(stream) == ["error task_failed"]


def test_starting_the_log_again_replaces_it(stream: io.StringIO, clock: Clock) -> None:
    old = io.StringIO()
    start_logging("info", "text", old)
    start_logging("info", "text", stream)
    Log("cenote.proxy", clock).info("started")
    assert old.getvalue() == ""
    assert lines(stream) == ["info started"]


def test_a_traceback_follows_its_line_and_in_json_is_a_field_of_it(stream: io.StringIO, clock: Clock) -> None:
    error = ValueError("broken")
    start_logging("info", "text", stream)
    Log("cenote.proxy", clock).error("task_failed", exc_info=error)
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("error task_failed")
    assert rest[-1] == "ValueError: broken"
    start_logging("info", "json", again := io.StringIO())
    Log("cenote.proxy", clock).error("task_failed", exc_info=error)
    assert json.loads(again.getvalue())["traceback"].endswith("ValueError: broken")


@given(value=st.text(max_size=80))
def test_no_value_can_end_its_line_or_begin_another_field(value: str) -> None:
    quoted = module._quoted(value)
    assert "\n" not in quoted
    assert "\r" not in quoted
    assert quoted == value if re.fullmatch(r"[A-Za-z0-9_.:/@+*\[\]-]+", value) else json.loads(quoted) == value


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"password": "hunter2"}, "password=***"),
        ({"server_password": "hunter2"}, "server_password=***"),
        ({"verifier": "SCRAM-SHA-256$hunter2"}, "verifier=***"),
        ({"url": "postgresql://app:hunter2@db/orders"}, 'url="postgresql://app:***@db/orders"'),
        ({"error": "bad dsn host=a password=hunter2 port=1"}, 'error="bad dsn host=a password=*** port=1"'),
        ({"error": "password='hunter2 x' y"}, 'error="password=*** y"'),
    ],
)
def test_no_secret_is_written(fields: dict[str, str], shown: str, stream: io.StringIO, clock: Clock) -> None:
    start_logging("debug", "text", stream)
    Log("cenote.proxy", clock).error("login_failed", **fields)
    assert "hunter2" not in stream.getvalue()
    assert lines(stream)[0].replace('"', "") == f"error login_failed {shown}".replace('"', "")


def test_a_long_value_is_cut(stream: io.StringIO, clock: Clock) -> None:
    start_logging("info", "text", stream)
    Log("cenote.proxy", clock).error("login_failed", error="x" * 100_000)
    assert len(stream.getvalue()) < 1000


def test_a_storm_is_its_first_line_and_a_count_every_ten_seconds(stream: io.StringIO, clock: Clock) -> None:
    start_logging("info", "text", stream)
    log = Log("cenote.proxy", clock)
    for nth in range(5000):
        log.warning("login_refused", client=f"10.0.0.1:{nth}", user=f"u{nth}", reason="wrong_password")
    assert lines(stream) == ["warning login_refused client=10.0.0.1:0 user=u0 reason=wrong_password"]
    clock.now += QUIET_S - 0.1
    log.flush()
    assert len(lines(stream)) == 1
    clock.now += 0.2
    log.flush()
    assert lines(stream)[1:] == ["warning login_refused reason=wrong_password repeated=4999 in_s=10.0"]
    log.flush()
    assert len(lines(stream)) == 2


def test_without_a_flush_the_next_event_of_the_kind_brings_the_count(stream: io.StringIO, clock: Clock) -> None:
    start_logging("info", "text", stream)
    log = Log("cenote.proxy", clock)
    for _ in range(3):
        log.warning("dial_failed", pool="a/b")
    clock.now += QUIET_S
    log.warning("dial_failed", pool="a/b")
    assert lines(stream)[1:] == ["warning dial_failed pool=a/b repeated=2"]


def test_another_pool_or_reason_is_another_kind(stream: io.StringIO, clock: Clock) -> None:
    start_logging("info", "text", stream)
    log = Log("cenote.proxy", clock)
    for pool in ("a/x", "b/x"):
        for reason in ("settings", "listen"):
            log.info("pinned", pool=pool, reason=reason)
            log.info("pinned", pool=pool, reason=reason)
    assert len(lines(stream)) == 4


def test_at_level_debug_every_event_is_written(stream: io.StringIO, clock: Clock) -> None:
    start_logging("debug", "text", stream)
    log = Log("cenote.proxy", clock)
    for _ in range(5):
        log.warning("dial_failed", pool="a/b")
    assert len(lines(stream)) == 5


def test_the_last_flush_writes_what_is_not_overdue(stream: io.StringIO) -> None:
    start_logging("info", "text", stream)
    log = get_log("cenote.proxy.of_this_test")
    assert get_log("cenote.proxy.of_this_test") is log
    log.warning("dial_failed", pool="a/b")
    log.warning("dial_failed", pool="a/b")
    flush_logs()
    assert len(lines(stream)) == 1
    flush_logs(last=True)
    assert lines(stream)[1:] == ["warning dial_failed pool=a/b repeated=1 in_s=10.0"]


def test_kinds_without_number_do_not_fill_memory() -> None:
    damper = Damper()
    passed = sum(damper.pass_on((nth,), 0.0) is not None for nth in range(100_000))
    assert passed <= 1001
    assert damper.overdue(QUIET_S) == [(("",), 100_000 - 1001)]


def test_every_event_that_the_source_logs_is_declared_and_every_declared_one_is_logged() -> None:
    logged: dict[str, str] = {}
    for path in sorted((ROOT / "src" / "cenote").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("debug", "info", "warning", "error")
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "log"
            ):
                assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}: an event is a word"
                logged[str(node.args[0].value)] = f"{path.name}:{node.lineno}"
    assert logged.keys() == EVENTS.keys(), "declare events in EVENTS of proxy/log.py"


def test_the_page_of_events_is_current() -> None:
    assert (ROOT / "docs" / "logs.md").read_text() == markdown(), "run: python -m cenote.proxy.log > docs/logs.md"
