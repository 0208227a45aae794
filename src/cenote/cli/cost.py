"""`cenote cost`: the anatomy of `measure/cost.py` and `measure/cost_https.py` as tables, a picture and a page.

It shows figures; every one is measured there. Progress goes to standard error and only to a terminal, the result
to standard output.
"""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from cenote.cli.endings import plain_endings
from cenote.cli.instrument import AsJson, Plot, Report, check_files, paper, progress
from cenote.errors import ConfigError
from cenote.measure import cost_words as words
from cenote.measure.cost import Result, Setup, Tell, run
from cenote.measure.cost_https import OriginResult, is_origin, run_origin
from cenote.measure.cost_saving import saving

_DEFAULTS = Setup()
_RTT = re.compile(r"([0-9]+(?:\.[0-9]+)?)(us|µs|ms|s)")
_UNITS_S = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}

Anything = Annotated[
    str | None,
    typer.Argument(
        metavar="[URL]",
        help="A PostgreSQL server, as libpq takes it (postgresql://user@host/db or service=name; PGPASSWORD, "
        "PGPASSFILE and PGSERVICE count), or an origin (https://host/path). Without: a private PostgreSQL, "
        "started for this and removed afterwards.",
        show_default=False,
    ),
]


def cost(
    url: Anything = None,
    samples: Annotated[int, typer.Option(help="Connections for each distance (1 to 1000).")] = _DEFAULTS.samples,
    rtt: Annotated[
        str,
        typer.Option(
            metavar="TIMES",
            help="Simulated distances, round trip times to put in between, such as 1ms,20ms,200ms: each piece is "
            "really held back. 1 ms is about another zone, 20 ms another region, 200 ms another continent.",
            show_default=False,
        ),
    ] = "",
    rate: Annotated[float, typer.Option(help="Requests a second, for what pooling would save.")] = _DEFAULTS.rate,
    sql: Annotated[
        str, typer.Option(help="The query. It is run as it is, several times on each connection.")
    ] = _DEFAULTS.sql,
    seconds: Annotated[
        float, typer.Option(help="The longest that each part may take: each distance, the server's CPU.")
    ] = _DEFAULTS.seconds,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="For https:// URLs: whose certificates to trust, PEM. Default: the system's, or SSL_CERT_FILE. "
            "(For PostgreSQL: sslrootcert in the URL.)",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    plot: Plot = None,
    report: Report = None,
) -> None:
    """Take a connection apart: what each phase costs, near and far, and what a pool would save.

    DNS, TCP, TLS, authentication, server set-up, session parameters, the first query, a warm query, the end: time,
    round trips, bytes and CPU of each; memory of an idle and of a used backend; ports. One connection at a time;
    nothing is made on the server. How to read it, and what it cannot see: docs/cost.md.

        cenote cost

        cenote cost --rtt 1ms,20ms,200ms --plot cost.png

        cenote cost postgresql://app@db.example/app --rate 500

        cenote cost https://example.com/
    """
    with plain_endings():
        check_files(plot, report)
        setup = Setup(samples=samples, rtts=_rtts(rtt), rate=rate, seconds=seconds, sql=sql)
        if tls_ca is not None and not is_origin(url):
            raise ConfigError(["tls-ca: it is for https:// URLs; for PostgreSQL put sslrootcert into the URL"])
        with _showing() as tell:
            result: Result | OriginResult
            if is_origin(url):
                assert url is not None
                result = run_origin(url, setup, tell, ca=str(tls_ca) if tls_ca is not None else None)
            else:
                result = run(url, setup, tell)
        try:
            if plot is not None:
                _plot(result, plot)
            if report is not None:
                _report(result, report)
        except OSError as error:
            if error.filename is None:
                raise
            raise ConfigError([f"{error.filename}: {error.strerror}"]) from None
        if as_json:
            typer.echo(json.dumps(words.as_dict(result), indent=2))
        else:
            _print(result)


def _rtts(text: str) -> tuple[float, ...]:
    """Times with units, separated by commas, nearest first.

    :raises ConfigError: naming each that is none
    """
    found, problems = set(), []
    for word in (part.strip() for part in text.split(",")) if text.strip() else ():
        match = _RTT.fullmatch(word)
        if match is None:
            problems.append(f"rtt = {word!r}: must be a time with a unit, such as 20ms or 0.2s")
        else:
            found.add(float(match[1]) * _UNITS_S[match[2]])
    if problems:
        raise ConfigError(problems)
    return tuple(sorted(found))


@contextmanager
def _showing() -> Iterator[Tell]:
    """Says on a terminal what is being measured."""
    console = progress()
    if not console.is_terminal:
        yield lambda stage, done, total: None
        return
    with console.status("starting") as status:
        begun = time.monotonic()

        def tell(stage: str, done: int, total: int) -> None:
            status.update(f"{stage}: {done} of {total}  ({time.monotonic() - begun:.0f} s)")

        yield tell


def _title(result: Result | OriginResult) -> str:
    return result.target.title if isinstance(result, Result) else f"{result.title} over HTTP"


def _below(result: Result | OriginResult) -> str:
    machine = result.machine
    return (
        f"{machine['cpus']} CPUs, {machine['system']}, Python {machine['python']}, cenote {machine['cenote']}, "
        f"core: {machine['core']}"
    )


# -- the table --------------------------------------------------------------------------------------------------


def _print(result: Result | OriginResult) -> None:
    console = paper()
    near, local = result.near, words.is_local(result)
    console.print(f"One connection to {_title(result)}, {words.place(near, local=local)}, n={near.samples}")
    console.print(_below(result))
    _table(console, words.PHASE_HEADINGS, words.phase_rows(near))
    for name, text in words.facts(result):
        console.print(_hanging(name, text, console.width))
    if result.far:
        console.print()
        console.print("Medians over simulated distances (+ what is put in between, there and back)")
        _table(console, *words.distance_rows(result.distances, local=local))
    if isinstance(result, Result):
        console.print()
        console.print(f"At {result.setup.rate:,.6g} requests a second, on average")
        _table(console, words.SAVING_HEADINGS, words.saving_rows(result, saving(result)))
    console.print()
    for sentence in words.conclusion(result):
        console.print(sentence)


def _table(console: Console, headings: object, rows: object) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    assert isinstance(headings, (list, tuple))
    assert isinstance(rows, list)
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="right" if column else "left", overflow="fold")
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == "ready" else None)
    console.print(table)


def _hanging(name: str, text: str, width: int) -> Table:
    """A name, and beside it what there is to say."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=17)
    grid.add_column(max_width=width - 20)
    grid.add_row(name, text)
    return grid


# -- files ------------------------------------------------------------------------------------------------------


def _plot(result: Result | OriginResult, path: Path) -> None:
    from cenote.measure import cost_picture, ink

    ink.save(
        lambda figure, colours: cost_picture.draw(result, figure, colours), path, size=cost_picture.size(result)
    )


def _report(result: Result | OriginResult, path: Path) -> None:
    from cenote.measure import cost_picture, ink, page

    local = words.is_local(result)
    light, dark = (
        ink.svg(
            lambda figure, colours: cost_picture.draw(result, figure, colours),
            size=cost_picture.size(result),
            ink=colours,
        )
        for colours in (ink.LIGHT, ink.DARK)
    )
    parts: list[page.Part] = [
        page.Words(words.conclusion(result)),
        page.Picture(light, dark, "Each distance on a scale of its own. Thin lines: p10 to p90."),
        page.Grid(words.PHASE_HEADINGS, words.phase_rows(result.near), heading="Phase by phase"),
        page.Grid(("what", "seen"), words.facts(result), heading="What else was seen", words=frozenset({1})),
    ]
    if result.far:
        headings, rows = words.distance_rows(result.distances, local=local)
        parts.append(page.Grid(headings, rows, heading="Over simulated distances, medians"))
    if isinstance(result, Result):
        heading = f"At {result.setup.rate:,.6g} requests a second, on average"
        parts.append(page.Grid(words.SAVING_HEADINGS, words.saving_rows(result, saving(result)), heading=heading))
    page.write(path, f"One connection to {_title(result)}", _below(result), parts)
