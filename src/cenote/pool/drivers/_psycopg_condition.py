"""In which condition a psycopg connection is: asked at every release, so it is a hot module of its own.

Reads what libpq knows; no round trip, no decision.
"""

from __future__ import annotations

from typing import Any

from cenote.pool.drivers.base import BROKEN, BUSY, IDLE, IN_TRANSACTION

_CONDITIONS = (IDLE, BUSY, IN_TRANSACTION, IN_TRANSACTION, BROKEN)  # by PQtransactionStatus


def condition(conn: Any) -> int:
    """IDLE, IN_TRANSACTION, BUSY or BROKEN."""
    pgconn = conn.pgconn
    status = _CONDITIONS[pgconn.transaction_status]
    # The lock is held by a stream, COPY or notifies() that the borrower has not ended.
    if (pgconn.pipeline_status or conn.lock.locked()) and status != BROKEN:
        return BUSY
    return status
