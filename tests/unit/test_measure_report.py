"""What a report says of the console's rows: a verdict, a sentence and options for each pool."""

from __future__ import annotations

from typing import Any

import pytest

from cenote.measure.report import IDLE, READY, STANDS, UNKNOWN, Suggestion, counted, report, span

WHOSE = {"database": "shop", "user": "app"}


def tables(
    *,
    mode: str = "transaction",
    transactions: int = 100,
    incidents: int = 0,
    ledger: list[dict[str, Any]] | None = None,
    pins: list[dict[str, Any]] | None = None,
    observed: dict[str, int] | None = None,
    max_pinned: str | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """The console's rows of one pool."""
    names = ("clients", "connections", "busy", "pinned", "listening", "needed")
    return {
        "VERSION": [{"version": "1.2", "uptime_s": 7200.0}],
        "POOLS": [{**WHOSE, "mode": mode, "clients": 12, "size": 4, "max_size": 10}],
        "STATS": [{**WHOSE, "transactions": transactions, "conversions": 3, "incidents": incidents}],
        "CONFIG": [{"key": "pools.shop/app.max_pinned", "value": max_pinned}],
        "LEDGER": [{**WHOSE, **line} for line in ledger or []],
        "PINS": [{**WHOSE, **pin} for pin in pins or []],
        "OBSERVED": [
            {
                **WHOSE,
                "seconds": 7200.0,
                **{f"{name}_peak": observed[name] for name in names},
                "needed_p99": observed["p99"],
            }
        ]
        if observed
        else [],
    }


def line(what: str, times: int = 1, statement: str = "X") -> dict[str, Any]:
    return {"what": what, "times": times, "statement": statement, "advice": "do"}


DRY = {"clients": 40, "connections": 40, "busy": 5, "pinned": 0, "listening": 0, "needed": 8, "p99": 5}


def test_a_dry_run_without_pins_is_ready_and_says_what_it_would_need() -> None:
    made = report("here:6432", tables(mode="session", observed=DRY, ledger=[line("carried: settings", 9)]))
    (pool,) = made.pools
    assert pool.verdict == READY
    assert pool.suggestion == Suggestion(7, None)
    assert pool.conclusion == (
        "Ready for transaction mode: nothing seen in 2.0 h would keep a connection. Transaction mode would have "
        "needed at most 8 server connections instead of 40, and 5 for 99 % of the time. Suggested for it: "
        "max_size = 7."
    )
    assert not made.stands_against
    assert made.conclusion == "Nothing stands against transaction mode in shop/app."


def test_a_dry_run_with_pins_says_whom_they_keep_and_how_many_may_be_pinned() -> None:
    rows = tables(
        mode="session",
        observed={**DRY, "pinned": 3},
        ledger=[line("pinned: listen", 3), line("pinned: advisory_locks"), line("carried: settings")],
        pins=[{"pid": 1, "reason": "listen"}, {"pid": 1, "reason": "advisory_locks"}],
    )
    made = report("here:6432", rows)
    (pool,) = made.pools
    assert (pool.verdict, pool.pinned, pool.suggestion) == (STANDS, 1, Suggestion(7, 4))
    assert pool.conclusion.startswith(
        "2 kinds of statement would keep up to 3 of 40 clients pinned (1 now): listen, advisory_locks."
    )
    assert made.stands_against


def test_of_transaction_mode_it_says_what_pins_now_and_suggests_nothing() -> None:
    rows = tables(ledger=[line("pinned: listen", 3)], pins=[{"pid": 1, "reason": "listen"}], max_pinned="2")
    (pool,) = report("here:6432", rows).pools
    assert (pool.verdict, pool.max_pinned, pool.suggestion) == (STANDS, 2, None)
    assert pool.conclusion == "1 kind of statement keeps 1 of 12 clients pinned now: listen."


def test_session_mode_that_nobody_observes_is_not_judged() -> None:
    made = report("here:6432", tables(mode="session", pins=[{"pid": 1, "reason": "session_mode"}]))
    (pool,) = made.pools
    assert (pool.verdict, pool.pinned) == (UNKNOWN, 0)
    assert "observe = true" in pool.conclusion
    assert made.stands_against


@pytest.mark.parametrize(
    ("named", "verdict"),
    [
        ({}, READY),
        ({"transactions": 0}, IDLE),
        ({"incidents": 1}, STANDS),
        ({"ledger": [line("refused: listen")]}, STANDS),
        ({"ledger": [line("others", 5)]}, STANDS),
        ({"ledger": [line("carried: role"), line("cleared"), line("asked: unknown")]}, READY),
    ],
)
def test_verdicts(named: dict[str, Any], verdict: str) -> None:
    """Pins, refusals, incidents and what the ledger had no room for stand against it; nothing else does."""
    made = report("here:6432", tables(**named))
    assert made.pools[0].verdict == verdict
    assert made.stands_against == (verdict != READY)


def test_a_load_that_needs_all_its_connections_is_told_that_nothing_is_saved() -> None:
    (pool,) = report(
        "here:6432", tables(mode="session", observed={**DRY, "needed": 40, "busy": 40, "p99": 40})
    ).pools
    assert "It would save nothing at this load" in pool.conclusion


def test_an_idle_pool_beside_a_ready_one_does_not_stand_against_it() -> None:
    rows, idle = tables(), tables(transactions=0)
    for name in ("POOLS", "STATS"):
        rows[name].append({**idle[name][0], "user": "other"})
    made = report("here:6432", rows)
    assert [pool.verdict for pool in made.pools] == [READY, IDLE]
    assert not made.stands_against


def test_one_database_can_be_looked_at_alone() -> None:
    assert report("here:6432", tables(), "other").pools == ()
    assert report("here:6432", tables(), "other").stands_against
    assert [pool.name for pool in report("here:6432", tables(), "shop").pools] == ["shop/app"]


def test_numbers_and_times_are_words() -> None:
    assert [counted(number, "client") for number in (0, 1, 1200)] == ["0 clients", "1 client", "1,200 clients"]
    assert [span(seconds) for seconds in (3.2, 119.0, 120.0, 7200.0, 200_000.0)] == [
        "3 s",
        "119 s",
        "2.0 min",
        "2.0 h",
        "2.3 days",
    ]
