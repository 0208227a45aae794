"""`cenote size`: the measurement of `measure/size.py` with a live view, a table, a picture and a report.

It shows figures; every one is measured or computed there. Progress goes to standard error and only to a terminal,
the result to standard output.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from cenote.cli.endings import plain_endings
from cenote.cli.instrument import AsJson, Plot, Report, Url, check_files, paper, progress
from cenote.errors import ConfigError, MissingDependency

_HEADINGS = (
    "connections",
    "transactions/s",
    "spread",
    "fitted",
    "median",
    "p99",
    "switches/s",
    "on locks",
    "system CPU",
    "",
)
_LEFT_OUT_FIRST = ("fitted", "spread", "switches/s", "system CPU", "on locks", "p99")


def size(
    url: Url = None,
    sql: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SQL",
            help="What your program asks; several make a mix, `3: SELECT ...` comes three times as often. "
            "It is run for real, again and again: mind what it writes.",
            show_default=False,
        ),
    ] = None,
    pgbench_script: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A pgbench script: SQL, \\set and \\sleep; FILE@3 comes three times as often.",
            show_default=False,
        ),
    ] = None,
    define: Annotated[
        list[str] | None,
        typer.Option("--define", "-D", metavar="NAME=VALUE", help="A variable of the scripts, such as scale=100."),
    ] = None,
    protocol: Annotated[str, typer.Option(help="simple, or prepared statements.")] = "simple",
    most: Annotated[
        int | None,
        typer.Option(
            "--max",
            help="The largest number of connections, which has to fit (4 to 2,000; 64, or as many as are free).",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="The longest it may take (2 to 3,600 seconds).")] = 30.0,
    instances: Annotated[int, typer.Option(min=1, help="Of your program, that share the server.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Processes of each instance, each with a pool.")] = 1,
    overlap: Annotated[
        float,
        typer.Option(
            min=0, max=100, help="Percent of the instances that a deployment has twice for a while (100: all)."
        ),
    ] = 100.0,
    cores: Annotated[
        int | None, typer.Option(min=1, help="Of the server, for the formula; seen by itself if it runs here.")
    ] = None,
    spindles: Annotated[int, typer.Option(min=0, help="Disks that seek, for the formula; an SSD is 1.")] = 1,
    as_json: AsJson = False,
    plot: Plot = None,
    report: Report = None,
) -> None:
    """The right pool size, measured: throughput against connections, and the knee.

    Runs your queries in a closed loop on 1, 2, 3, 4, 6, 8 ... connections, several short rounds each, and fits the
    universal scalability law. The knee is the smallest number of connections that gives 95 % of the maximum: more
    than that only makes everybody wait longer.

        cenote size

        cenote size postgresql://app@db/shop --sql "SELECT ..." --sql "3: UPDATE ..."

        cenote size service=shop --pgbench-script orders.sql -D scale=100 --instances 10 --workers 4

    Without --sql the query is a look-up of one row in the catalog, which any role may do and which leaves nothing
    behind. It never takes the server's last connections, stops early when the answer is certain, and leaves no
    session behind, also after Ctrl-C. How to read the figures: docs/size.md.
    """
    with plain_endings():
        check_files(plot, report)
        _need_science()
        from cenote.measure.mix import parse_definitions
        from cenote.measure.size import DEFAULT, Setup, run
        from cenote.measure.size_findings import Fleet, advice, as_dict
        from cenote.measure.target import target

        sources = tuple(_sources(sql or [], pgbench_script or []))
        setup = Setup(
            most=most,
            seconds=seconds,
            protocol=protocol,
            sources=sources or (DEFAULT,),
            definitions=parse_definitions(define or []),
        )
        setup.check()
        fleet = Fleet(instances, workers, overlap / 100)
        with _Show() as show, target(url) as server:
            result = run(server, setup, show.tell)
        found = advice(result, fleet, cores, spindles)
        _write(result, fleet, found, plot, report)  # first: whoever reads the rest may go away in the middle
        if as_json:
            typer.echo(json.dumps(as_dict(result, fleet, found), indent=2))
        else:
            _print(result, fleet, found)
        if not as_json:
            for name, path in (("Picture", plot), ("Report", report)):
                if path is not None:
                    typer.echo(f"{name}: {path}")


def _need_science() -> None:
    try:
        import scipy.optimize  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f'the fit needs {error.name}, which is not installed: pip install "cenote[measure]"'
        ) from None


def _sources(sql: list[str], scripts: list[Path]) -> Any:
    """The user's queries.

    :raises ConfigError: naming each file that cannot be read
    """
    from cenote.measure.mix import Source, weighted

    problems = []
    for number, text in enumerate(sql, 1):
        yield weighted(f"--sql {number}" if len(sql) > 1 else "--sql", text)
    for path in scripts:
        name, at, weight = str(path).rpartition("@")
        if not (at and weight.isdigit()):
            name, weight = str(path), "1"
        try:
            yield Source(Path(name).name, Path(name).read_text(encoding="utf-8"), int(weight))
        except (OSError, UnicodeDecodeError) as error:
            words = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            problems.append(f"pgbench_script = {name!r}: {words}")
    if problems:
        raise ConfigError(problems)


class _Show:
    """The live view: what is being measured, and the levels so far."""

    def __init__(self) -> None:
        console = progress()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("looking at the server")

    def __enter__(self) -> "_Show":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tell(self, moment: Any) -> None:
        best = max(moment.rates, key=moment.rates.get, default=0)
        if not best:
            return
        self._progress.update(
            self._task,
            description=f"{moment.connections} connections: {moment.rates.get(moment.connections, 0):,.0f}/s; "
            f"best so far {moment.rates[best]:,.0f}/s with {best}; round {moment.rounds}, "
            f"{moment.seconds_left:.0f} s left at most",
        )


def rows(result: Any) -> list[tuple[str, ...]]:
    """The table, line by line."""
    from cenote.measure.findings import duration
    from cenote.measure.size_findings import marked

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    def time(value: float | None) -> str:
        return "-" if value is None else duration(value)

    lines: list[tuple[str, ...]] = []
    for level in result.levels:
        spread = (max(level.rates) - min(level.rates)) / 2 / level.rate
        switches = level.switches_per_s
        lines.append(
            (
                str(level.connections),
                f"{level.rate:,.0f}",
                f"± {spread:.0%}",
                f"{result.fit.law.at(level.connections):,.0f}",
                time(level.p50_s),
                time(level.p99_s),
                "-" if switches is None else f"{switches:,.0f}",
                share(level.locked if level.waits else None),
                share(level.system_cpu),
                marked(level, result),
            )
        )
    return lines


def _print(result: Any, fleet: Any, found: Any) -> None:
    from cenote.measure.size_findings import answer, explained

    console = paper()
    console.print(result.target.title, markup=False)
    console.print(_asked(result), markup=False)
    table, left_out = fitting(rows(result), console)
    console.print(table)
    if left_out:
        console.print(f"For want of width without: {', '.join(left_out)}.\n", markup=False)
    console.print(answer(result), style="bold", markup=False)
    for sentence in explained(result, fleet, found):
        console.print(f"- {sentence}", markup=False)


def fitting(lines: list[tuple[str, ...]], console: Console) -> tuple[Table, list[str]]:
    """The table as wide as fits, and the columns that do not: a narrow terminal is to lose no part of a figure."""
    left_out: list[str] = []
    while True:
        shown = [at for at, heading in enumerate(_HEADINGS) if heading not in left_out]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for at in shown:
            table.add_column(_HEADINGS[at], justify="right" if _HEADINGS[at] else "left", no_wrap=True)
        for line in lines:
            table.add_row(*(line[at] for at in shown), style="bold" if line[-1] else None)
        needed = Measurement.get(console, console.options.update(width=1000), table).maximum
        if needed <= console.width or len(left_out) == len(_LEFT_OUT_FIRST):
            return table, left_out
        left_out.append(_LEFT_OUT_FIRST[len(left_out)])


def _asked(result: Any) -> str:
    setup = result.setup
    texts = "; ".join(
        (f"{source.weight} x " if len(setup.sources) > 1 else "") + _short(source) for source in setup.sources
    )
    why = "the answer is certain" if result.ended == "certain" else "the time is over"
    return (
        f"{texts} ({setup.protocol} protocol)\n"
        f"{sum(len(level.rates) for level in result.levels)} rounds in {result.seconds:.1f} s, ended because {why}"
    )


def _short(source: Any) -> str:
    from cenote.measure.size import DEFAULT

    if source == DEFAULT:
        return f"{source.name}: one row of pg_attribute, by its key"
    text = " ".join(source.text.split())
    return f"{source.name}: {text if len(text) <= 90 else text[:87] + '...'}"


def _write(result: Any, fleet: Any, found: Any, plot: Path | None, report: Path | None) -> None:
    if plot is None and report is None:
        return
    from cenote.measure import ink, page
    from cenote.measure.size_findings import answer, explained
    from cenote.measure.size_picture import SIZE, drawing

    draw = drawing(result, found)
    try:
        if plot is not None:
            ink.save(draw, plot, size=SIZE)
        if report is not None:
            light, dark = (ink.svg(draw, size=SIZE, ink=each) for each in (ink.LIGHT, ink.DARK))
            parts: list[page.Part] = [
                page.Words([answer(result), *explained(result, fleet, found)]),
                page.Picture(light, dark, "Throughput, latency, and what makes bigger slower."),
                page.Grid(_HEADINGS, rows(result), heading="The levels", words=frozenset({9})),
                page.Words(_asked(result).splitlines(), heading="What was measured"),
            ]
            page.write(report, "The right pool size", result.target.title, parts)
    except OSError as error:
        if error.filename is None:
            raise
        raise ConfigError([f"{error.filename}: {error.strerror}"]) from None
