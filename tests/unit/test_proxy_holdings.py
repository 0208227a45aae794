"""What a session holds as far as its texts tell: by name where there is one, by number for locks."""

from __future__ import annotations

import pytest

from cenote.proxy.holdings import Holdings, may_end
from cenote.proxy.reading import clearing, read
from cenote.sql import touch


def after(*texts: str) -> int:
    """What is held after these texts, each with the kinds that reading it yields."""
    holdings = Holdings()
    for text in texts:
        raw = text.encode()
        holdings.ran(read(raw).ties, raw)
    return holdings.ties


@pytest.mark.parametrize(
    ("texts", "held"),
    [
        (("LISTEN a",), touch.LISTEN),
        (("LISTEN a", "unlisten A"), 0),
        (('LISTEN "A"', "UNLISTEN a"), touch.LISTEN),
        (("LISTEN a; LISTEN b", "UNLISTEN a"), touch.LISTEN),
        (("LISTEN a; LISTEN b", "UNLISTEN a; UNLISTEN b"), 0),
        (("LISTEN a; UNLISTEN a",), 0),
        (("LISTEN a", "DISCARD ALL; LISTEN b", "UNLISTEN b"), 0),
        (("CREATE TEMP TABLE a (i int)", "DROP TABLE IF EXISTS pg_temp.a CASCADE"), 0),
        (("CREATE TEMP TABLE a (i int); CREATE TEMPORARY SEQUENCE b", "DROP TABLE a"), touch.TEMP),
        (("CREATE TEMP TABLE IF NOT EXISTS a (i int)", "CREATE TEMP VIEW b AS SELECT 1", "DROP TABLE a, b"), 0),
        (("SELECT 1 AS i INTO TEMP a", "DROP TABLE a"), touch.TEMP),  # its name is not looked for
        (("SELECT 1 AS i INTO TEMP a", "DISCARD TEMP"), 0),
        (("DECLARE a SCROLL CURSOR WITH HOLD FOR SELECT 1", "CLOSE a"), 0),
        (("DECLARE a CURSOR WITH HOLD FOR SELECT 1", "CLOSE b"), touch.CURSOR),
        (("DECLARE a CURSOR WITH HOLD FOR SELECT 1", "CLOSE ALL"), 0),
        (("SELECT pg_advisory_lock(1), pg_advisory_lock(2)", "SELECT pg_advisory_unlock(1)"), touch.ADVISORY),
        (("SELECT pg_try_advisory_lock_shared(1)", "SELECT pg_advisory_unlock_shared(1)"), 0),
        (("SELECT pg_advisory_lock(1)", "SELECT pg_advisory_unlock_all()"), 0),
        (("SELECT pg_advisory_lock(1), pg_advisory_unlock(1)",), 0),
        (("SELECT nextval('s')", "SELECT setval('s', 1)", "DISCARD SEQUENCES"), 0),
        (("SELECT setseed(0.5)", "DISCARD ALL"), touch.LOAD),
    ],
)
def test_it_holds_what_was_begun_and_not_ended(texts: tuple[str, ...], held: int) -> None:
    assert after(*texts) == held


def test_names_beyond_the_bound_are_held_until_all_of_the_kind_ends() -> None:
    names = [f"c{number}" for number in range(300)]
    assert after(*(f"LISTEN {name}" for name in names), *(f"UNLISTEN {name}" for name in names)) == touch.LISTEN
    assert after(*(f"LISTEN {name}" for name in names), "UNLISTEN *") == 0


def test_only_texts_with_the_words_for_it_may_end_something() -> None:
    assert all(map(may_end, (b"UNLISTEN a", b"drop table a", b"CLOSE c", b"SELECT pg_advisory_unlock(1)")))
    assert not any(map(may_end, (b"INSERT INTO closed VALUES (1)", b"SELECT dropped FROM t")))


def test_going_back_to_the_role_of_the_log_in_clears_only_together_with_all_settings() -> None:
    assert clearing("SET SESSION AUTHORIZATION DEFAULT; RESET ALL") == touch.ROLE | touch.SETTINGS
    assert clearing("SET SESSION AUTHORIZATION DEFAULT") == 0
