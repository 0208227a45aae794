"""Why things happen: the words that errors, logs, metrics, admin views and docs share.

Each enum answers one question. A member's value is the word that is printed; its docstring-like text
in `TEXT` completes the sentence for a reader. Nothing here decides anything: the core picks a reason,
the rooms above report it. Plain strings cross into compiled modules; enums stay at the edges.
"""

from enum import StrEnum


class Opened(StrEnum):
    """Why a connection was opened."""

    DEMAND = "demand"
    MINIMUM = "minimum"
    PROBE = "probe"
    ATTEMPT = "attempt"


class Refused(StrEnum):
    """Why an acquire was refused."""

    TIMEOUT = "timeout"
    QUEUE_FULL = "queue_full"
    SHED = "shed"
    DRAINING = "draining"
    CLOSED = "closed"
    CONNECT_FAILED = "connect_failed"
    DEADLOCK = "deadlock"
    ABANDONED = "abandoned"


class Closed(StrEnum):
    """Why a connection was closed."""

    IDLE_TIMEOUT = "idle_timeout"
    MAX_LIFETIME = "max_lifetime"
    SURPLUS = "surplus"
    STALE = "stale"
    SERVER_CLOSED = "server_closed"
    CHECK_FAILED = "check_failed"
    RESET_FAILED = "reset_failed"
    BROKEN = "broken"
    BY_BORROWER = "by_borrower"
    LEAKED = "leaked"
    DIAL_FAILED = "dial_failed"
    NOT_NEEDED = "not_needed"
    DRAINING = "draining"
    POOL_CLOSED = "pool_closed"
    FORKED = "forked"
    PINNED = "pinned"
    UNFINISHED = "unfinished"
    PROTOCOL = "protocol"
    CANCEL_FAILED = "cancel_failed"
    GAVE_WAY = "gave_way"
    PAUSED = "paused"


class Pinned(StrEnum):
    """Why a proxy's client keeps its server connection past the transaction."""

    SETTINGS = "settings"
    ROLE = "role"
    TEMPORARY_OBJECTS = "temporary_objects"
    ADVISORY_LOCKS = "advisory_locks"
    LISTEN = "listen"
    HELD_CURSORS = "held_cursors"
    PREPARED_BY_SQL = "prepared_by_sql"
    SEQUENCES = "sequences"
    PLANS = "plans"
    PROCESS_STATE = "process_state"
    UNKNOWN = "unknown"
    STATEMENT_TOO_LONG = "statement_too_long"
    FUNCTION_CALL = "function_call"
    CLIENT_ENCODING = "client_encoding"
    SESSION_MODE = "session_mode"


class Failure(StrEnum):
    """What a failure says about the other connections of the same destination."""

    DESTINATION = "destination"
    CONNECTION = "connection"
    PRIVATE = "private"
    TEMPORARY = "temporary"
    PERMANENT = "permanent"


TEXT: dict[str, dict[str, str]] = {
    "opened": {
        "demand": "a waiter needed it",
        "minimum": "the pool keeps min_size connections warm",
        "probe": "the destination was down; one dial at a time asks whether it is back",
        "attempt": "somebody asked without waiting; the next one may find it",
    },
    "refused": {
        "timeout": "no connection became free within the caller's acquire_timeout",
        "queue_full": "max_waiting callers already stood in line",
        "shed": "the queue stood for longer than CoDel allows and the caller had waited too long",
        "draining": "the pool is draining: no new leases",
        "closed": "the pool is closed",
        "connect_failed": "the server refuses to let us in, and asking again will not help",
        "deadlock": "every holder is itself waiting in this pool",
        "abandoned": "the caller went away while in line (cancelled, interrupted)",
    },
    "closed": {
        "idle_timeout": "unused for idle_timeout and above min_size",
        "max_lifetime": "older than max_lifetime (with its own jitter)",
        "surplus": "above the limit after it was lowered",
        "stale": "opened before the destination last failed or was told to refresh",
        "server_closed": "the server had closed it",
        "check_failed": "the check of an idle connection failed",
        "reset_failed": "its session could not be returned to a known state",
        "broken": "it broke in the hands of its borrower",
        "by_borrower": "the borrower closed it",
        "leaked": "the borrower dropped it without giving it back",
        "dial_failed": "it could not be opened",
        "not_needed": "the need was gone before it was dialed",
        "draining": "the pool is draining",
        "pool_closed": "the pool was closed",
        "forked": "it was inherited through fork and belongs to the parent",
        "pinned": "the client it was pinned to left, and what its session holds is not undone",
        "unfinished": "its client left in the middle of a message",
        "protocol": "the server sent what the protocol does not allow",
        "gave_way": "another pool of the same server needed it more",
        "paused": "the pool is paused",
        "cancel_failed": "nobody knows whether its cancel request was delivered, and it could hit another query",
    },
    "pinned": {
        "settings": "a setting that is beyond its user, made with a function's rights",
        "role": "SET ROLE or SET SESSION AUTHORIZATION",
        "temporary_objects": "temporary tables, views, sequences or functions",
        "advisory_locks": "advisory locks of the session",
        "listen": "LISTEN: notifications go to the session",
        "held_cursors": "a cursor WITH HOLD",
        "prepared_by_sql": "PREPARE by SQL in a form that cannot be repeated elsewhere, or of too many statements",
        "sequences": "nextval or setval, which currval and lastval answer from",
        "plans": "DISCARD PLANS",
        "process_state": "LOAD, the random seed, or what else nothing but closing undoes",
        "unknown": "DO, CALL or a text that cannot be told",
        "statement_too_long": "the text is too long to be read",
        "function_call": "a function called by number that is not one of the large objects'",
        "client_encoding": "in this client encoding texts cannot be read byte by byte",
        "session_mode": "mode = session: each client has one connection",
    },
    "failure": {
        "destination": "the server itself failed: every older connection is stale",
        "connection": "this connection failed; two within a second mean the server",
        "private": "this connection failed for a reason of its own",
        "temporary": "the server cannot take a connection now; asking again may help",
        "permanent": "the server will not take this connection however often it is asked",
    },
}

#: What to do about a pin, for whoever wonders why so many connections are needed.
ADVICE: dict[str, str] = {
    "settings": "a SECURITY DEFINER function can SET LOCAL what it needs, or have it in its own SET clause",
    "temporary_objects": "drop temporary tables when done, or create them ON COMMIT DROP in a transaction",
    "advisory_locks": "pg_advisory_xact_lock ends with the transaction; session locks last until unlocked",
    "listen": "one connection listens for all clients where max_size is 2 or more and max_pinned leaves room",
    "held_cursors": "close cursors WITH HOLD, or fetch within the transaction",
    "prepared_by_sql": "use the driver's prepared statements (protocol level) instead of PREPARE by SQL",
    "sequences": "INSERT ... RETURNING gives the value without currval; DISCARD SEQUENCES ends the pin",
    "process_state": "LOAD by shared_preload_libraries or session_preload_libraries at the server",
    "unknown": "SHOW LEDGER says which texts",
    "statement_too_long": "send data as parameters, or by COPY",
    "function_call": "call functions by SQL",
    "client_encoding": "set client_encoding to UTF8",
}

# SQLSTATE (PostgreSQL, appendix A) to what it says of the destination. Classes are two characters.
_STATES: dict[str, Failure] = {
    "57P01": Failure.CONNECTION,  # admin_shutdown: also what pg_terminate_backend sends to one session
    "57P02": Failure.DESTINATION,  # crash_shutdown
    "57P03": Failure.DESTINATION,  # cannot_connect_now: starting up, shutting down, in recovery
    "57P05": Failure.PRIVATE,  # idle_session_timeout
    "25P03": Failure.PRIVATE,  # idle_in_transaction_session_timeout
    "25P04": Failure.PRIVATE,  # transaction_timeout
    "25006": Failure.DESTINATION,  # read_only_sql_transaction, from what should be a primary
    "53300": Failure.TEMPORARY,  # too_many_connections
    "3D000": Failure.PERMANENT,  # invalid_catalog_name: no such database
    "0A000": Failure.PERMANENT,  # feature_not_supported, at connection start
    "42501": Failure.PERMANENT,  # insufficient_privilege: may not connect
    "55000": Failure.PERMANENT,  # the database does not accept connections
    "42704": Failure.PERMANENT,  # unknown parameter in the startup packet
    "22023": Failure.PERMANENT,  # bad value of a parameter in the startup packet
}
_CLASSES: dict[str, Failure] = {
    "08": Failure.CONNECTION,
    "28": Failure.PERMANENT,
    "53": Failure.TEMPORARY,
}


def failure_of(sqlstate: str) -> Failure:
    """What a fatal error with this SQLSTATE says about the destination (unknown: only this connection)."""
    return _STATES.get(sqlstate) or _CLASSES.get(sqlstate[:2], Failure.PRIVATE)


def fatal_failure(sqlstate: str) -> Failure | None:
    """The same for an error in the middle of a session, None where it need not have ended the connection."""
    known = _STATES.get(sqlstate) if sqlstate[:2] in ("57", "25") else _CLASSES.get(sqlstate[:2])
    return known if known in (Failure.DESTINATION, Failure.CONNECTION, Failure.PRIVATE) else None
