"""MD5 passwords: both sides, and the server's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.embedded import Postgres
from cenote.wire import md5


@given(st.text(max_size=20), st.text(max_size=20), st.binary(min_size=4, max_size=4))
def test_both_sides_agree_on_the_right_password_and_on_no_other(user: str, password: str, salt: bytes) -> None:
    secret = md5.stored(user, password)
    assert md5.verify(secret, salt, md5.response(secret, salt))
    assert not md5.verify(secret, salt, md5.response(md5.stored(user, password + "x"), salt))


@pytest.mark.parametrize("answer", [b"", b"md5", b"md5" + b"0" * 32, b"\xff" * 35, b"x" * 65_535])
def test_no_other_bytes_are_the_right_answer(answer: bytes) -> None:
    assert not md5.verify(md5.stored("alice", "secret"), b"salt", answer)


@pytest.mark.parametrize(
    "secret", ["", "secret", "md5", "md5" + "0" * 31, "md5" + "Z" * 32, "SCRAM-SHA-256$1:a$b:c"]
)
def test_what_is_not_the_stored_form_lets_nobody_in(secret: str) -> None:
    assert not md5.is_stored(secret)
    assert not md5.verify(secret, b"salt", md5.response(secret, b"salt"))


@pytest.mark.pg
def test_the_server_stores_the_same(pg18: Postgres) -> None:
    import psycopg

    with psycopg.connect(pg18.superuser_dsn) as conn:  # never committed
        conn.execute("SET LOCAL password_encryption = 'md5'")
        conn.execute("SET LOCAL client_min_messages = error")
        conn.execute("CREATE ROLE \"md5 é\" PASSWORD 'sécret'")
        row = conn.execute("SELECT rolpassword FROM pg_authid WHERE rolname = 'md5 é'").fetchone()
        conn.rollback()
    assert row == (md5.stored("md5 é", "sécret"),)
