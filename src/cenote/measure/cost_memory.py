"""How much memory one backend takes: just logged in, and after some work.

Where the server is here, the kernel says it (PSS). Everywhere the server itself can be asked, if the role may; it
knows what it has allocated for itself, which is not all that the process takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from cenote.measure.address import Address
from cenote.measure.anatomy import Session
from cenote.measure.cost_server import Footprint, LocalServer

_ROUNDS = 5
_CONTEXTS_SINCE = 140_000
_STATEMENTS = 10
_EXECUTIONS = 6  # from the sixth on a generic plan may be kept

_ALLOCATED = "SELECT sum(total_bytes) FROM pg_backend_memory_contexts"
_MAY_ASK = """SELECT has_table_privilege('pg_backend_memory_contexts', 'select')
AND has_function_privilege('pg_get_backend_memory_contexts()', 'execute')"""

_CATALOGS = (
    "SELECT n.nspname, c.relname, c.relkind, pg_get_userbyid(c.relowner), pg_table_size(c.oid) "
    "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
    "WHERE c.relkind IN ('r', 'v', 'm') AND pg_table_is_visible(c.oid) ORDER BY 1, 2",
    "SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns "
    "WHERE table_schema = 'pg_catalog' ORDER BY table_name, ordinal_position",
    "SELECT indexrelid::regclass, pg_get_indexdef(indexrelid) FROM pg_index ORDER BY 1",
)
_JOIN = (
    "SELECT t.typname, count(*), avg(length(a.attname)) FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid "
    "JOIN pg_type t ON t.oid = a.atttypid LEFT JOIN pg_description d ON d.objoid = c.oid "
    "AND d.objsubid = a.attnum GROUP BY t.typname ORDER BY 2 DESC"
)
_PREPARED = (
    "SELECT a.attname, a.attnum FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid "
    "WHERE c.relname = $1 AND a.attnum > {number}"
)


def typical_work() -> list[str]:
    """What a used backend has done: looked at the catalogs as tools do, one join, some prepared statements."""
    work = [*_CATALOGS, _JOIN]
    for number in range(_STATEMENTS):
        name = f"cenote_cost_{number}"
        work.append(f"PREPARE {name}(name) AS {_PREPARED.format(number=number)}")
        work += [f"EXECUTE {name}('pg_class')"] * _EXECUTIONS
    return work


@dataclass(frozen=True, slots=True)
class Memory:
    """A backend idle since its log-in, and a used one; medians of several backends, each alone.

    idle, used: from /proc
    allocated_idle, allocated_used: as the server says, in bytes; None: it does not tell
    why_no_pss, why_not_allocated: "" where the figures are there
    """

    idle: Footprint
    used: Footprint
    allocated_idle: int | None
    allocated_used: int | None
    why_no_pss: str
    why_not_allocated: str


def backend_memory(address: Address, local: LocalServer | None, version: int, sql: str) -> Memory:
    """Measure it, one connection at a time.

    :param sql: the user's statement, part of the work of a used backend
    :raises TargetUnusable: the server went away
    """
    idle, used = [], []
    for _ in range(_ROUNDS if local is not None else 0):
        with Session(address) as session:
            assert local is not None
            idle.append(local.footprint(session.anatomy.backend_pid))
            _work(session, sql)
            used.append(local.footprint(session.anatomy.backend_pid))
            session.finish()
    before, after, why = _allocated(address, version, sql)
    pss = _middle(idle)
    return Memory(pss, _middle(used), before, after, _why_no_pss(local, pss), why)


def _work(session: Session, sql: str) -> None:
    for statement in typical_work():
        session.query(statement)
    session.query(sql)


def _allocated(address: Address, version: int, sql: str) -> tuple[int | None, int | None, str]:
    if version < _CONTEXTS_SINCE:
        return None, None, "the server says it from PostgreSQL 14 on"
    with Session(address) as session:
        if session.value(_MAY_ASK) != "t":
            session.finish()
            return None, None, "the server says it only to superusers and to members of pg_read_all_stats"
        before = int(session.value(_ALLOCATED))
        _work(session, sql)
        after = int(session.value(_ALLOCATED))
        session.finish()
    return before, after, ""


def unknown_memory(why: str) -> Memory:
    """Nothing is known, and why."""
    none = Footprint(None, None, None)
    return Memory(none, none, None, None, why, why)


def _why_no_pss(local: LocalServer | None, seen: Footprint) -> str:
    if local is None:
        return "the server's processes cannot be seen from here"
    if seen.pss is not None:
        return ""
    return "/proc/PID/smaps_rollup may not be read: run this as the server's account, or as root"


def _middle(seen: Sequence[Footprint]) -> Footprint:
    def of(values: Sequence[int | None]) -> int | None:
        known = [value for value in values if value is not None]
        return round(median(known)) if known else None

    return Footprint(
        of([one.pss for one in seen]), of([one.private for one in seen]), of([one.page_tables for one in seen])
    )
