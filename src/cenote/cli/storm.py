"""`cenote storm`: the simulation of `measure/storm.py`, or a real storm, with a table, a picture and a report.

It shows figures; every one is computed or measured there. Progress goes to standard error and only to a terminal,
the result to standard output.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cenote.cli.endings import plain_endings
from cenote.cli.instrument import AsJson, Plot, Report, check_files, paper, progress
from cenote.errors import ConfigError, MissingDependency

_DEFAULT = "ten-thousand"


def storm(
    scenario: Annotated[
        str, typer.Argument(metavar="[SCENARIO]", help="One that is included (--list), or a .toml file.")
    ] = _DEFAULT,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="TABLE.OPTION=VALUE", help="Change the scenario, such as clients.instances=50."
        ),
    ] = None,
    way: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this one: none, local, budget, proxy. Several times for several.", show_default=False
        ),
    ] = None,
    costs: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Costs as measured: what cenote size --json or cenote cost --json wrote. Twice for both.",
            show_default=False,
        ),
    ] = None,
    real: Annotated[
        bool,
        typer.Option("--real", help="Do it to a real server on this machine, bounded, beside the simulation."),
    ] = False,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The server for --real; without, a private one.", show_default=False),
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Name the included scenarios.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the scenario with every default, as TOML.")] = False,
    as_json: AsJson = False,
    plot: Plot = None,
    report: Report = None,
) -> None:
    """What happens when N clients arrive: no pool, local pools, local pools under a budget, a proxy.

    Simulated, by discrete events on the very code that decides in Cenote's pools, under a virtual clock: no server
    is needed and none is touched. A million requests take some seconds.

        cenote storm --list

        cenote storm thousand-functions --plot storm.png

        cenote storm restart --set clients.instances=200 --set restart.down_s=10

        cenote size postgresql://... --json > size.json; cenote cost postgresql://... --json > cost.json

        cenote storm cliff --costs size.json --costs cost.json

    With --real the same requests go to a real server on this machine, for at most half a minute each way, and
    stand beside a simulation of that server. How to read the figures, and how far to trust them: docs/storm.md.
    """
    with plain_endings():
        check_files(plot, report)
        _need_numpy()
        from cenote.measure.scenario import included, load
        from cenote.measure.storm import changed, with_costs

        if listed:
            for name, each in included().items():
                typer.echo(f"{name:20} {each.title}. {each.text}")
            return
        asked = load(scenario)
        for measured in costs or ():
            asked = with_costs(asked, measured)
        asked = changed(asked, change or [])
        if show:
            from cenote.measure.storm import as_toml

            typer.echo(as_toml(asked))
            return
        if url is not None and not real:
            raise ConfigError(["url: a simulation needs no server; --real asks one"])
        ways = _ways(way or [], real)
        with _Show() as live:
            results = _run(asked, ways, url if real else None, real, live)
        if as_json:
            typer.echo(json.dumps(_figures(results, real), indent=2))
        else:
            _print(results)
        _write(results, plot, report, quiet=as_json)


def _need_numpy() -> None:
    try:
        import numpy  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f'storms need {error.name}, which is not installed: pip install "cenote[measure]"'
        ) from None


def _ways(asked: list[str], real: bool) -> tuple[str, ...]:
    from cenote.measure.outcome import WAYS
    from cenote.measure.storm_real import REAL_WAYS

    known = REAL_WAYS if real else WAYS
    problems = [f"way = {each!r}: use one of {', '.join(known)}" for each in asked if each not in known]
    if problems:
        raise ConfigError(problems)
    return tuple(each for each in known if not asked or each in asked)


def _run(asked: Any, ways: tuple[str, ...], url: str | None, real: bool, live: "_Show") -> dict[str, Any]:
    """The storms by what they are: "simulated", and with --real that of the server too."""
    from cenote.measure.storm import run

    if not real:
        return {"simulated": run(asked, ways, live.tell)}
    from cenote.measure.storm_real import run_real

    done = run_real(asked, ways, url, live.tell)
    return {f"real, on {done.title}": done.storm, "simulated, with the costs of that server": done.simulated}


class _Show:
    """The live view: a bar for each way."""

    def __init__(self) -> None:
        console = progress()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} requests"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task: Any = None
        self._way = ""

    def __enter__(self) -> "_Show":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tell(self, moment: Any) -> None:
        from cenote.measure.storm_findings import NAMES

        if moment.way != self._way:
            self._way = moment.way
            self._task = self._progress.add_task(NAMES[moment.way], total=moment.requests)
        self._progress.update(self._task, completed=moment.ended)


def _figures(results: dict[str, Any], real: bool) -> dict[str, Any]:
    from cenote.measure.storm_findings import as_dict, disagreements

    figures = [as_dict(each) for each in results.values()]
    if not real:
        return figures[0]
    beyond = list(disagreements(*results.values()))
    return {"real": figures[0], "simulated": figures[1], "beyond_stated_error": beyond}


def _print(results: dict[str, Any]) -> None:
    from cenote.measure.storm_findings import HEADINGS, disagreements, explained, rows

    console = paper()
    first = next(iter(results.values())).scenario
    console.print(first.title, style="bold", markup=False)
    if first.text:
        console.print(first.text, markup=False)
    for kind, each in results.items():
        scenario = each.scenario
        console.print(
            f"\n{kind[0].upper()}{kind[1:]}: {each.outcomes[0].requests:,} requests; "
            f"{scenario.server.cores} cores, {scenario.usable} connections to be had; "
            f"{scenario.clients.instances} instances x {scenario.clients.pool_size}, "
            f"budget {scenario.budget}, proxy {scenario.proxy_size}",
            markup=False,
        )
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for number, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if number else "left")
        for row in rows(each):
            table.add_row(*row)
        console.print(table)
        for sentence in explained(each):
            console.print(f"- {sentence}", markup=False)
    if len(results) == 2:
        for sentence in disagreements(*results.values()):
            console.print(f"- {sentence}", markup=False)
    if len(results) == 1:
        simulated = sum(each.requests for each in first_of(results).outcomes)
        took = sum(first_of(results).wall_s)
        console.print(f"Simulated {simulated:,} requests in {took:.1f} s.", markup=False)


def first_of(results: dict[str, Any]) -> Any:
    return next(iter(results.values()))


def _write(results: dict[str, Any], plot: Path | None, report: Path | None, quiet: bool) -> None:
    if plot is None and report is None:
        return
    from cenote.measure import ink, page
    from cenote.measure.storm_findings import HEADINGS, disagreements, explained, rows
    from cenote.measure.storm_picture import SIZE, drawing

    kind, first = next(iter(results.items()))
    try:
        if plot is not None:
            ink.save(drawing(first, kind), plot, size=SIZE)
        if report is not None:
            parts: list[page.Part] = [page.Words([first.scenario.text] if first.scenario.text else [])]
            for name, each in results.items():
                draw = drawing(each, name)
                light, dark = (ink.svg(draw, size=SIZE, ink=colours) for colours in (ink.LIGHT, ink.DARK))
                parts.append(page.Grid(HEADINGS, rows(each), heading=name[0].upper() + name[1:]))
                parts.append(page.Words(list(explained(each))))
                parts.append(page.Picture(light, dark, each.scenario.title))
            if len(results) == 2:
                parts.append(page.Words(list(disagreements(*results.values()))))
            page.write(report, first.scenario.title, kind, parts)
    except OSError as error:
        raise ConfigError([f"{error.filename}: {error.strerror}"]) from None
    if not quiet:
        for name, path in (("Picture", plot), ("Report", report)):
            if path is not None:
                typer.echo(f"{name}: {path}")
