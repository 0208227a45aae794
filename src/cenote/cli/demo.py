"""`cenote demo`: the experiment of `measure/demo.py` with a live view, a table and a picture.

It shows figures; every one is measured there, and none is known beforehand. Progress goes to standard error
and only to a terminal, the result to standard output.
"""

import json
from collections.abc import Callable, Iterator, Sequence
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
from cenote.cli.instrument import AsJson, Plot, check_files
from cenote.config import Option
from cenote.measure.demo import WAYS, Moment, Result, Setup, Side, run
from cenote.measure.findings import as_dict, conclusion, duration, mebibytes, percent, times
from cenote.measure.load import ROWS

_PIPED_WIDTH = 110
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
    serverless: Annotated[int, typer.Option(help=_help("serverless"))] = _DEFAULTS.serverless,
    postgres: Annotated[
        int, typer.Option(help="Major version of the private server: 16 or 18.")
    ] = _DEFAULTS.postgres,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Many callers at once: a connection for each request, a pool, and the proxy, side by side.

    Then the serverless case: short-lived tasks that connect once each, directly and through the proxy.

    Servers and proxy are started for this and removed afterwards; nothing else on this machine is touched. How to
    read the table: docs/demo.md.
    """
    with plain_endings():
        check_files(plot)
        setup = Setup(
            clients=clients,
            requests=requests,
            every=every,
            pool_size=pool_size,
            max_connections=max_connections,
            seconds=seconds,
            serverless=serverless,
            postgres=postgres,
        )
        setup.check()
        with _Show(setup) as show:
            result = run(setup, show.tell)
        if plot is not None:
            from cenote.measure.plot import draw

            draw(result, plot)
        if as_json:
            typer.echo(json.dumps(as_dict(result), indent=2))
        else:
            _print(result, plot)


class _Show:
    """The live view: a bar for each way, what was refused, and the server's processes now."""

    def __init__(self, setup: Setup) -> None:
        self._titles = {
            "direct": "a connection for each request",
            "pool": f"a pool of {setup.pool_size}",
            "proxy": f"a proxy with {setup.pool_size} behind it",
        }
        if setup.serverless:
            self._titles["serverless_direct"] = "short-lived tasks, directly"
            self._titles["serverless_proxy"] = "short-lived tasks, through the proxy"
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
            way: self._progress.add_task(
                title, total=total if way in WAYS else setup.serverless, start=False, moment=None
            )
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
    names = ["one per request", f"pool of {setup.pool_size}", f"proxy with {setup.pool_size}"]
    console.print(_table("", names, "against the first", result.sides))
    if result.serverless:
        title = f"{setup.serverless:,} short-lived tasks at once"
        console.print(_table(title, ["directly", "through the proxy"], "against that", result.serverless))
    console.print(conclusion(result))
    if plot is not None:
        console.print(f"Picture: {plot}")


def _table(title: str, names: list[str], remark: str, sides: Sequence[Side]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(title)
    for name in names:
        table.add_column(name, justify="right")
    table.add_column(remark)
    for row in _rows(sides):
        table.add_row(*row)
    return table


def _rows(sides: Sequence[Side]) -> Iterator[list[str]]:
    yield ["requests", *(f"{side.requests:,}" for side in sides), "same moments and keys"]
    for word in ("answered", "refused", "failed", "unfinished"):
        counts = [getattr(side, word) for side in sides]
        if word in {"answered", "refused"} or any(counts):
            shown = [f"{n:,} ({percent(n, side.requests)})" for n, side in zip(counts, sides, strict=True)]
            yield [word, *shown, _against(counts)]
    for share in (50, 95, 99):
        latencies = [side.latency_s(share / 100) for side in sides]
        shown = ["-" if value is None else duration(value) for value in latencies]
        yield [f"latency of the answered, p{share}", *shown, _against(latencies)]
    for name, field, show in _MEASURED:
        values = [getattr(side, field) for side in sides]
        yield [name, *("not known" if v is None else show(v) for v in values), _against(values)]
    for name, field, show in _PROXY:
        yield [name, *(_of_proxy(side, field, show) for side in sides), ""]


def _of_proxy(side: Side, field: str, show: Callable[[float], str]) -> str:
    if not side.way.endswith("proxy"):
        return "-"
    value = getattr(side, field)
    return "not known" if value is None else show(value)


def _against(values: Sequence[float | None]) -> str:
    """Each but the first as a share or multiple of the first."""
    first, *others = values
    if not first:
        return ""
    return "; ".join(
        "" if value is None else times(first, value).removesuffix(" of") if value else "none" for value in others
    )


def _count(value: float) -> str:
    return f"{value:,.0f}"


_MEASURED: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("server connections opened", "opened", _count),
    ("backend processes, peak", "peak_backends", _count),
    ("backend memory (PSS), peak", "peak_memory_bytes", mebibytes),
    ("server CPU", "server_cpu_s", duration),
    ("server CPU for each answer", "server_cpu_per_answer_s", duration),
    ("callers' CPU for each answer", "callers_cpu_per_answer_s", duration),
    ("sockets left in TIME_WAIT", "time_wait", _count),
)
_PROXY: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("the proxy's own CPU", "proxy_cpu_s", duration),
    ("the same for each answer", "proxy_cpu_per_answer_s", duration),
    ("the proxy's memory (PSS), peak", "proxy_memory_bytes", mebibytes),
)
