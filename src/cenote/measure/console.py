"""Reads tables of a running daemon's console. It looks only, and says whose fault it is when it cannot."""

from collections.abc import Iterable, Mapping
from typing import Any

from cenote.errors import MissingDependency, TargetUnusable
from cenote.measure.target import one_line

#: The virtual database that answers.
DATABASE = "cenote"
_MARK = "(Cenote "  # in what it says of its version, as no server does


def tables(conninfo: Mapping[str, Any], names: Iterable[str]) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """Where it is, and the rows of these tables, by name.

    :param conninfo: what libpq takes, without the database
    :raises TargetUnusable: unreachable, not a console, or its user is no admin
    :raises MissingDependency: psycopg is not installed
    """
    try:
        import psycopg
        from psycopg.rows import dict_row
    except ImportError as error:
        raise MissingDependency(
            f'this needs {error.name}, which is not installed: pip install "cenote[measure]"'
        ) from None
    try:
        with psycopg.connect(
            **{**conninfo, "dbname": DATABASE}, autocommit=True, row_factory=dict_row
        ) as connection:
            where = f"{connection.info.host}:{connection.info.port}"
            _look(where, connection.info.parameter_status("server_version") or "")
            return where, {name: connection.execute(f"SHOW {name}".encode()).fetchall() for name in names}
    except psycopg.OperationalError as error:
        raise TargetUnusable(_why_not(one_line(error), conninfo)) from None
    except psycopg.Error as error:
        raise TargetUnusable(f"the console answered: {one_line(error)}") from None


def _look(where: str, version: str) -> None:
    """Return when this is a console of Cenote.

    :raises TargetUnusable: it is another server
    """
    if _MARK in version:
        return
    what = "PgBouncer" if "bouncer" in version.lower() else f"a server that calls itself {version!r}"
    raise TargetUnusable(f"{where} is not a console of Cenote but {what}: give the address of `cenote serve`")


def _why_not(text: str, conninfo: Mapping[str, Any]) -> str:
    """What to do about a connection that could not be made, by what the other side has said."""
    user = conninfo.get("user") or "this user"
    if "admin_users" in text:
        return f"{user} is no admin of this daemon: {text}"
    if "no such database" in text or ("database" in text and "does not exist" in text):
        return (
            f"there is no console: {text}. PostgreSQL and other poolers have no database {DATABASE!r}; give the "
            "address of `cenote serve` (port 6432 if nothing else was said)"
        )
    if "password" in text or "authentication" in text:
        return f"the console does not let {user} in: {text}"
    return f"cannot reach the console: {text}"
