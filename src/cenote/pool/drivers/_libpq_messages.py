"""What libpq and the server say when a connection cannot be opened or is lost, read for its SQLSTATE.

libpq gives no SQLSTATE for an error at connection start, and psycopg2 no way to ask it for a verbose message.
These are the English words; a message in another language is not understood, and no harm is done: the pool
then asks again, as after any failure whose cause it does not know.
"""

import re

_MESSAGES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), sqlstate)
    for pattern, sqlstate in (
        (r"password authentication failed|no password supplied|empty password", "28P01"),
        (r"authentication failed|no pg_hba\.conf entry|pg_hba\.conf rejects|not permitted to log in", "28000"),
        (r'role "[^\n]*" does not exist', "28000"),
        (r'database "[^\n]*" (does not exist|has disappeared)', "3D000"),
        (r'database "[^\n]*" is not currently accepting connections', "55000"),
        (r"too many (clients|connections)|remaining connection slots are reserved", "53300"),
        (r"database system is (starting up|shutting down|in recovery|not (yet )?accepting conn)", "57P03"),
        (r"terminating connection due to administrator command", "57P01"),
        (r"terminating connection because of crash of another server process", "57P02"),
        (r"terminating connection due to idle-in-transaction timeout", "25P03"),
        (r"terminating connection due to idle-session timeout", "57P05"),
        (r"unrecognized configuration parameter", "42704"),
        (r"invalid value for parameter", "22023"),
        (r"permission denied for database", "42501"),
    )
)
LOST = re.compile(r"closed the connection|connection (has been|was) closed|already closed|connection not open")
WRONG_TLS = re.compile(r"certificate|SSL was required|does not support SSL")


def sqlstate_of(message: str) -> str:
    """The SQLSTATE that belongs to an English message of the server at connection start, "" if not known."""
    return next((sqlstate for pattern, sqlstate in _MESSAGES if pattern.search(message)), "")
