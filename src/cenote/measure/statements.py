"""What a server's statements cost and how often they come, from pg_stat_statements, where it is installed.

It reads the view and changes nothing. `cenote size` shows it; `cenote storm` takes from it how unlike queries are.
"""

from dataclasses import dataclass
from typing import Any

_MOST = 20
_WHERE = "SELECT extnamespace::regnamespace::text FROM pg_extension WHERE extname = 'pg_stat_statements'"
_READ = """
SELECT sum(s.calls)::bigint, sum(s.total_exec_time) / 1000.0, left(max(s.query), 200)
FROM {schema}.pg_stat_statements AS s JOIN pg_database AS d ON d.oid = s.dbid
WHERE d.datname = current_database() AND s.calls > 0
GROUP BY s.queryid ORDER BY 2 DESC LIMIT {most}
"""


@dataclass(frozen=True, slots=True)
class Statement:
    """One kind of statement. mean_s: execution without planning and network."""

    calls: int
    mean_s: float
    query: str


def statements(conn: Any) -> tuple[Statement, ...] | None:
    """Those that took most of this database's time, the dearest first; None where the server does not tell."""
    import psycopg

    try:
        row = conn.execute(_WHERE).fetchone()
        if row is None:
            return None
        rows = conn.execute(_READ.format(schema=row[0], most=_MOST)).fetchall()
    except psycopg.Error:
        return None  # installed and not loaded, older than 13, or not for our role
    return tuple(
        Statement(calls, float(total_s) / calls, " ".join(query.split())) for calls, total_s, query in rows
    )


def mean_s(found: tuple[Statement, ...]) -> float:
    """What a call takes on average over all of these; more than one at least."""
    return sum(each.calls * each.mean_s for each in found) / sum(each.calls for each in found)
