"""`cenote demo`: the experiment of `measure/demo.py` with a live view, a table and a picture.

It shows figures; every one is measured there, and none is known beforehand. Progress goes to standard error
and only to a terminal, the result to standard output.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cenote.cli.endings import plain_endings
from cenote.config import Option
from cenote.errors import ConfigError, MissingDependency
from cenote.measure.demo import Moment, Result, Setup, Side, run
from cenote.measure.findings import as_dict, conclusion, duration, mebibytes, percent, times
from cenote.measure.load import ROWS

_PIPED_WIDTH = 110
_PICTURES = (".png", ".svg")
_DEFAULTS = Setup()


def _option(name: str) -> Option:
    option: Option = Setup.__dataclass_fields__[name].metadata["option"]
    return option


def _help(name: str) -> str:
    option = _option(name)
    text = option.text[0].upper() + option.text[1:]
    return f"{text} ({option.range()}{' ' if option.unit else ''}{option.unit})."


def demo(
    clients: Annotated[int, typer.Option(help=_help("clients"))] = _DEFAULTS.clients,
    requests: Annotated[int, typer.Option(help=_help("requests"))] = _DEFAULTS.requests,
    every: Annotated[float, typer.Option(help=_help("every"))] = _DEFAULTS.every,
    pool_size: Annotated[int, typer.Option(help=_help("pool_size"))] = _DEFAULTS.pool_size,
    max_connections: Annotated[int, typer.Option(help=_help("max_connections"))] = _DEFAULTS.max_connections,
    seconds: Annotated[float, typer.Option(help=_help("seconds"))] = _DEFAULTS.seconds,
    postgres: Annotated[
        int, typer.Option(help="Major version of the private server: 16 or 18.")
    ] = _DEFAULTS.postgres,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it, as .png or .svg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write every figure as JSON, no table.")] = False,
) -> None:
    """Many callers at once on a private server: a connection for each request, then a pool, side by side.

    The server is started for this and removed afterwards; nothing else on this machine is touched. How to read
    the table: docs/demo.md.
    """
    with plain_endings():
        draw = _drawer(plot) if plot is not None else None
        setup = Setup(
            clients=clients,
            requests=requests,
            every=every,
            pool_size=pool_size,
            max_connections=max_connections,
            seconds=seconds,
            postgres=postgres,
        )
        setup.check()
        with _Show(setup) as show:
            result = run(setup, show.tell)
        if draw is not None:
            draw(result)
        if as_json:
            typer.echo(json.dumps(as_dict(result), indent=2))
        else:
            _print(result, plot)


def _drawer(path: Path) -> Callable[[Result], None]:
    """What draws to `path`. All that can be wrong with it is found before the minute of measuring."""
    problems = []
    if path.suffix.lower() not in _PICTURES:
        problems.append(f"plot = {str(path)!r}: the name must end in {' or '.join(_PICTURES)}")
    if not path.absolute().parent.is_dir():
        problems.append(f"plot = {str(path)!r}: there is no directory {path.absolute().parent}")
    if problems:
        raise ConfigError(problems)
    try:
        from cenote.measure.plot import draw
    except ImportError as error:
        raise MissingDependency(
            f'--plot needs {error.name}, which is not installed: pip install "cenote[measure]"'
        ) from None
    return lambda result: draw(result, path)


class _Show:
    """The live view: a bar for each way, what was refused, and the server's processes now."""

    def __init__(self, setup: Setup) -> None:
        self._titles = {
            "direct": "a connection for each request",
            "pool": f"a pool of {setup.pool_size}",
        }
        console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}", justify="left"),
            BarColumn(bar_width=24),
            _Figures(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        total = setup.clients * setup.requests
        self._tasks = {
            way: self._progress.add_task(title, total=total, start=False, moment=None)
            for way, title in self._titles.items()
        }

    def __enter__(self) -> "_Show":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def tell(self, moment: Moment) -> None:
        task = self._tasks[moment.way]
        if moment.stage == "running":
            self._progress.start_task(task)
        counts = moment.counts
        done = counts.answered + counts.refused + counts.failed
        self._progress.update(task, completed=done, moment=moment)
        if moment.stage == "ended":
            self._progress.stop_task(task)


class _Figures(ProgressColumn):
    """Answered, refused, backends, memory."""

    def render(self, task: Task) -> Text:
        moment: Moment | None = task.fields["moment"]
        if moment is None:
            return Text("")
        if moment.stage == "starting":
            return Text("starting a server", style="dim")
        counts = moment.counts
        text = Text.assemble((f"{counts.answered:,} answered", "green"))
        text.append(f"  {counts.refused:,} refused", style="red" if counts.refused else "dim")
        if counts.failed:
            text.append(f"  {counts.failed:,} failed", style="red")
        if moment.backends.number is not None:
            most = "at most " if moment.stage == "ended" else ""
            text.append(f"  {most}{moment.backends.number:,} backends", style="yellow")
        if moment.backends.memory_bytes is not None:
            text.append(f"  {mebibytes(moment.backends.memory_bytes)}", style="yellow")
        return text


def _print(result: Result, plot: Path | None) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH, highlight=False)
    setup, machine = result.setup, result.machine
    rounds = "once" if setup.requests == 1 else f"{setup.requests} times, every {setup.every:g} s"
    console.print(
        f"{setup.clients:,} callers at once, {rounds}; a look-up by key among {ROWS:,} rows\n"
        f"PostgreSQL {setup.postgres}, max_connections = {setup.max_connections}; {machine['cpus']} CPUs, "
        f"{machine['system']}, Python {machine['python']}, cenote {machine['cenote']}, core: {machine['core']}"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("connection per request", justify="right")
    table.add_column(f"pool of {setup.pool_size}", justify="right", style="bold")
    table.add_column("the pool against that")
    for row in _rows(result.direct, result.pool):
        table.add_row(*row)
    console.print(table)
    console.print(conclusion(result))
    if plot is not None:
        console.print(f"Picture: {plot}")


def _rows(direct: Side, pool: Side) -> list[tuple[str, str, str, str]]:
    both = (direct, pool)
    rows = [_row("requests", [f"{side.requests:,}" for side in both], "the same callers, moments and keys")]
    for word in ("answered", "refused", "failed", "unfinished"):
        counts = [getattr(side, word) for side in both]
        if word in {"answered", "refused"} or any(counts):
            shown = [f"{n:,} ({percent(n, side.requests)})" for n, side in zip(counts, both, strict=True)]
            rows.append(_row(word, shown, _against(*counts)))
    for share in (50, 95, 99):
        latencies = [side.latency_s(share / 100) for side in both]
        shown = ["-" if value is None else duration(value) for value in latencies]
        rows.append(_row(f"latency of the answered, p{share}", shown, _against(*latencies)))
    measured: list[tuple[str, list[float | None], Callable[[float], str]]] = [
        ("server connections opened", [side.opened for side in both], _count),
        ("backend processes, peak", [side.peak_backends for side in both], _count),
        ("backend memory (PSS), peak", [side.peak_memory_bytes for side in both], mebibytes),
        ("server CPU", [side.server_cpu_s for side in both], duration),
        ("server CPU for each answer", [side.server_cpu_per_answer_s for side in both], duration),
        ("callers' CPU for each answer", [side.callers_cpu_per_answer_s for side in both], duration),
        ("sockets left in TIME_WAIT", [side.time_wait for side in both], _count),
    ]
    for name, values, show in measured:
        rows.append(_row(name, ["not known" if v is None else show(v) for v in values], _against(*values)))
    return rows


def _row(name: str, shown: list[str], remark: str) -> tuple[str, str, str, str]:
    return name, shown[0], shown[1], remark


def _against(direct: float | None, pool: float | None) -> str:
    if direct is None or pool is None or not direct:
        return ""
    return times(direct, pool).removesuffix(" of") if pool else "none"


def _count(value: float) -> str:
    return f"{value:,.0f}"
