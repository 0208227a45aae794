"""`cenote report`: what stands between each pool of a running daemon and transaction mode.

It reads the console and prints; what the figures mean is decided in `measure/report.py`. It changes nothing there.
"""

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cenote.cli.endings import plain_endings
from cenote.cli.instrument import AsJson, check_files, paper
from cenote.cli.instrument import Report as ReportFile
from cenote.errors import ConfigError, MissingDependency
from cenote.measure.console import DATABASE, tables
from cenote.measure.page import Grid, Part, Words, write
from cenote.measure.report import CONSEQUENCES, IDLE, READY, Line, PoolReport, Report, counted, span
from cenote.measure.report import report as made_of
from cenote.measure.target import one_line

_TABLES = ("VERSION", "POOLS", "STATS", "CONFIG", "LEDGER", "PINS", "OBSERVED", "DATABASES")
_DEFAULT_PORT, _SERVERS_PORT = 6432, "5432"
_TIMEOUT_S = 10
_AGAINST = 3
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "*": "127.0.0.1"}
_HEADINGS = ("consequence", "times", "statement, without its literals", "what to do")


def report(
    url: Annotated[
        str | None,
        typer.Argument(
            metavar="[URL]",
            help="The daemon, as libpq takes it (postgresql://admin@host:6432/cenote); PGHOST, PGUSER, "
            "PGPASSWORD, PGPASSFILE and PGSERVICE count. Without: 127.0.0.1:6432.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE", help="The daemon's configuration file says where it is."),
    ] = None,
    database: Annotated[
        str | None, typer.Option("--database", "-d", metavar="NAME", help="Only the pools of this database.")
    ] = None,
    as_json: AsJson = False,
    report: ReportFile = None,
) -> None:
    """Say what stands between each pool of a running daemon and transaction mode.

    What pins clients to server connections, how often, what is carried, what would be refused, and what to do
    about each. Of pools that run with `observe = true` (session mode, nothing changed) it says what transaction
    mode would have done, and how many server connections it would have needed. Log in as one of admin_users.

    \b
    Examples:
      cenote serve --config cenote.toml --observe      let clients work as usual for a day
      cenote report --config cenote.toml               then ask
      cenote report postgresql://boss@db:6432/cenote --report ready.html

    Exit status: 0 nothing stands against transaction mode, 3 something does or nothing is known yet, 1 the console
    could not be read, 2 wrong use. How to read it: docs/report.md.
    """
    with plain_endings():
        check_files(report=report, drawn=False)
        if url is not None and config is not None:
            raise ConfigError(["a URL and --config: give one of them; the file says where the daemon listens"])
        where, rows = tables(_of_file(config) if config is not None else _of_url(url or ""), _TABLES)
        if database is not None:
            _known(database, [row["database"] for row in rows["DATABASES"]])
        found = made_of(where, rows, database)
        if report is not None:
            write(report, "Ready for transaction mode?", _below(found), list(_parts(found)))
        if as_json:
            typer.echo(json.dumps(found.as_dict(), indent=2))
        else:
            _print(found, report)
    raise typer.Exit(_AGAINST if found.stands_against else 0)


def _known(database: str, names: list[str]) -> None:
    if database not in names:
        raise ConfigError([f"database = {database!r}: the daemon has {', '.join(sorted(names)) or 'none'}"])


# -- where it is ----------------------------------------------------------------------------------------------


def _of_url(url: str) -> dict[str, Any]:
    """What to connect with. libpq's environment and services count, its default port does not: that is a server's.

    :raises ConfigError: libpq cannot read it, or it names another database
    """
    try:
        from psycopg import ProgrammingError, pq
        from psycopg.conninfo import conninfo_to_dict
    except ImportError as error:
        raise MissingDependency(
            f'report needs {error.name}, which is not installed: pip install "cenote[measure]"'
        ) from None
    try:
        found = dict(conninfo_to_dict(url))
    except ProgrammingError as error:
        raise ConfigError([f"url: {one_line(error)}"]) from None
    if found.get("dbname") not in (None, DATABASE):
        raise ConfigError(
            [f"url: the database is {found['dbname']!r}; the console is the virtual database {DATABASE!r}"]
        )
    usual = {option.keyword.decode(): (option.val or b"").decode() for option in pq.Conninfo.get_defaults()}
    if "service" not in found:
        if not (found.get("host") or found.get("hostaddr") or usual.get("host") or usual.get("hostaddr")):
            found["host"] = "127.0.0.1"
        if "port" not in found and usual.get("port") == _SERVERS_PORT:
            found["port"] = _DEFAULT_PORT
    return {"connect_timeout": _TIMEOUT_S, "application_name": "cenote report", **found}


def _of_file(file: Path) -> dict[str, Any]:
    """The same from a configuration: its address, and the first of its admins, with the password if it is plain.

    :raises ConfigError: the file has problems, or does not say where its console is
    """
    from cenote.cli.endings import need_proxy

    need_proxy()
    from cenote.proxy.config import load_config
    from cenote.wire import md5

    loaded = load_config(file)
    listen = loaded.listen
    problems = []
    if not loaded.admin_users:
        problems.append(f"{file}: admin_users is empty, so nobody may log in to the console")
    if not listen.port:
        problems.append(f"{file}: listen.port is 0, a free one each time: give a URL")
    if problems:
        raise ConfigError(problems)
    hosts = [host.strip() for host in listen.host.split(",") if host.strip()]
    name = loaded.admin_users[0]
    stored = loaded.users[name].password if name in loaded.users else None
    found: dict[str, Any] = {
        "host": _EVERYWHERE.get(hosts[0], hosts[0]) if hosts else listen.unix_dir,
        "port": listen.port,
        "user": name,
        "connect_timeout": _TIMEOUT_S,
        "application_name": "cenote report",
    }
    if stored and not stored.startswith("SCRAM-SHA-256$") and not md5.is_stored(stored):
        found["password"] = stored
    return found


# -- on paper -------------------------------------------------------------------------------------------------


def _print(found: Report, html: Path | None) -> None:
    console = paper()
    console.print(Text(_head(found), style="bold"))
    for pool in found.pools:
        console.print()
        _print_pool(console, pool)
    console.print()
    console.print(Text(found.conclusion, style="bold"))
    if html is not None:
        console.print(Text(f"Report: {html}"))


def _print_pool(console: Console, pool: PoolReport) -> None:
    console.print(Text(_title(pool), style="bold cyan"))
    if pool.verdict == IDLE:
        console.print(Text(pool.conclusion))
        return
    width = max(len(label) for label, _ in _figures(pool)) + 2
    for label, value in _figures(pool):
        console.print(Text.assemble(("  " + label.ljust(width), "dim"), value))
    if pool.lines:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading, style in zip(_HEADINGS, ("", "", "cyan", "dim"), strict=True):
            table.add_column(
                heading,
                style=style,
                overflow="fold",
                justify="right" if heading == "times" else "left",
                no_wrap=heading in _HEADINGS[:2],
            )
        for line in _lines(pool):
            table.add_row(*map(Text, _cells(pool, line)))
        console.print(table)
    style = "green" if pool.verdict == READY else "yellow"
    console.print(Text(pool.conclusion, style=style))


def _head(found: Report) -> str:
    return f"cenote {found.version} at {found.where}, up {span(found.uptime_s)}"


def _below(found: Report) -> str:
    return f"{_head(found)}; {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"


def _title(pool: PoolReport) -> str:
    dry = f", dry run for {span(pool.peaks.seconds)}" if pool.peaks is not None else ""
    return f"pool {pool.name}: {pool.mode} mode{dry}"


def _figures(pool: PoolReport) -> Iterator[tuple[str, str]]:
    peaks = pool.peaks
    most = f", {peaks.clients:,} at most" if peaks is not None else ""
    yield "clients", f"{pool.clients:,} now{most}"
    # Those that no client has are in the first figure only.
    most = f", {peaks.connections:,} at most with a client" if peaks is not None else ""
    yield "server connections", f"{pool.connections:,} now{most} (max_size = {pool.max_size})"
    if peaks is not None:
        yield "in a transaction", f"{counted(peaks.busy, 'client')} at most at one moment"
        yield "would be pinned", f"{pool.pinned:,} now, {peaks.pinned:,} at most at one moment"
        if peaks.listening:
            yield "would listen", f"{counted(peaks.listening, 'client')} at most, by one connection for all"
        needed = f"{counted(peaks.needed, 'server connection')} at most at one moment"
        yield "would be needed", f"{needed}; {peaks.needed_p99:,} were enough for 99 % of the time"
    else:
        cap = "max_size - 1" if pool.max_pinned is None else str(pool.max_pinned)
        yield "pinned", f"{counted(pool.pinned, 'client')} now (max_pinned = {cap})"
    yield "transactions", f"{pool.transactions:,}"
    if pool.conversions:
        yield "conversions", f"{pool.conversions:,} (connections made to carry other settings)"


def _lines(pool: PoolReport) -> Iterator[Line]:
    for consequence in CONSEQUENCES:
        yield from pool.of(consequence)


def _cells(pool: PoolReport, line: Line) -> tuple[str, str, str, str]:
    would: Mapping[str, str] = _WOULD if pool.observed else {}
    what = would.get(line.consequence, line.consequence)
    reason = f": {line.reason}" if line.reason and line.consequence != "asked" else ""
    return what + reason, f"{line.times:,}", line.statement, line.advice


_WOULD = {
    "pinned": "would pin",
    "refused": "would refuse",
    "carried": "would carry",
    "asked": "would ask",
    "cleared": "clears",
}


def _parts(found: Report) -> Iterator[Part]:
    yield Words([found.conclusion])
    for pool in found.pools:
        yield Words([pool.conclusion], heading=_title(pool))
        yield Grid(("", ""), list(_figures(pool)), words=frozenset((1,)))
        if pool.lines:
            yield Grid(_HEADINGS, [_cells(pool, line) for line in _lines(pool)], words=frozenset((2, 3)))
