"""Advice names who sends a text, where that is known, and else what the reason says."""

from __future__ import annotations

import pytest

from cenote.proxy.advice import advice
from cenote.proxy.reading import fingerprint_of
from cenote.reasons import ADVICE, Pinned


@pytest.mark.parametrize(
    ("what", "text", "option"),
    [
        ("cleared", "DISCARD ALL", "No Reset On Close"),
        (
            "cleared",
            "SET SESSION AUTHORIZATION DEFAULT;RESET ALL;CLOSE ALL;UNLISTEN *;SELECT pg_advisory_unlock_all();"
            "DISCARD SEQUENCES;DISCARD TEMP",
            "No Reset On Close",
        ),
        ("cleared", "SELECT pg_advisory_unlock_all();\nCLOSE ALL;\nUNLISTEN *;\nRESET ALL;", "asyncpg"),
        ("carried: prepared", 'DEALLOCATE "_pg3_0"', "prepare_threshold"),
        ("carried: prepared", "DEALLOCATE a17", "statement_limit"),
        ("carried: prepared", "DEALLOCATE pdo_stmt_00000001", "ATTR_EMULATE_PREPARES"),
        ("cleared", "DEALLOCATE ALL", "pgbouncer=true"),
        ("pinned: advisory_locks", "SELECT pg_try_advisory_lock(1572350391218170155)", "advisory_locks: false"),
        ("refused: advisory_locks", "SELECT pg_advisory_lock(72707369)", "directUrl"),
        ("pinned: listen", 'LISTEN "oban_jobs"', "Oban.Notifiers.PG"),
        ("pinned: listen", "LISTEN river_control", "PollOnly"),
        (
            "pinned: held_cursors",
            'DECLARE "_django_curs_1234_sync_1" NO SCROLL CURSOR WITH HOLD FOR SELECT 1',
            "DISABLE_SERVER_SIDE_CURSORS",
        ),
        ("pinned: held_cursors", 'DECLARE "c" CURSOR WITH HOLD FOR SELECT 1', "withhold=False"),
        ("pinned: sequences", "select nextval('orders_seq')", "GenerationType.IDENTITY"),
        ("pinned: temporary_objects", 'create local temporary table "HT_orders" (id int)', "drop_tables"),
        ("carried: settings", "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", "setReadOnly"),
        ("carried: settings", "SET extra_float_digits = 3", "assumeMinServerVersion"),
        ("carried: settings", "SET client_min_messages TO 'warning'", "ALTER ROLE"),
    ],
)
def test_a_known_sender_is_named_with_its_option(what: str, text: str, option: str) -> None:
    assert option in advice(what, fingerprint_of(text.encode()).decode())


@pytest.mark.parametrize("reason", Pinned)
def test_an_unknown_sender_hears_what_the_reason_says(reason: str) -> None:
    if reason in ADVICE:
        assert advice(f"pinned: {reason}", "SOMETHING ELSE") == ADVICE[reason]


def test_what_is_carried_needs_no_advice() -> None:
    assert advice("carried: settings", "SET work_mem = ?") == ""
    assert advice("carried: settings", "SET SESSION AUTHORIZATION joe") == ""
