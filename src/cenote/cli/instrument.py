"""What the instruments' verbs have in common: where results go, and what must be right before measuring begins.

`--json` writes every figure to standard output instead of the table, `--plot` draws a picture, `--report` writes
an HTML page. All that can be wrong with a file's name is found before the first second of measuring.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cenote.errors import ConfigError, MissingDependency

PICTURES = (".png", ".svg")
PAGES = (".html", ".htm")
_PIPED_WIDTH = 120

Url = Annotated[
    str | None,
    typer.Argument(
        metavar="[URL]",
        help="The server, as libpq takes it (postgresql://user@host/db or service=name); PGPASSWORD, PGPASSFILE "
        "and PGSERVICE count. Without: a private server, started for this and removed afterwards.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write every figure as JSON, no table.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it, as .png or .svg.")]
Report = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a report, as one .html file.")]


def check_files(plot: Path | None = None, report: Path | None = None, *, drawn: bool = True) -> None:
    """Return when pictures can be drawn and the files have a place.

    :param drawn: there are pictures in the report
    :raises ConfigError: every problem of the names
    :raises MissingDependency: matplotlib is needed and not installed
    """
    problems = []
    for name, path, suffixes in (("plot", plot, PICTURES), ("report", report, PAGES)):
        if path is None:
            continue
        if path.suffix.lower() not in suffixes:
            problems.append(f"{name} = {str(path)!r}: the name must end in {' or '.join(suffixes)}")
        if not path.absolute().parent.is_dir():
            problems.append(f"{name} = {str(path)!r}: there is no directory {path.absolute().parent}")
    if problems:
        raise ConfigError(problems)
    if plot is not None or (report is not None and drawn):
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise MissingDependency(
                f'--plot and --report need {error.name}, which is not installed: pip install "cenote[measure]"'
            ) from None


def paper() -> Console:
    """Standard output for tables: as wide as the terminal, or wide enough where there is none."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=_PIPED_WIDTH, highlight=False)


def progress() -> Console:
    """Standard error for what is going on; say nothing to it unless `is_terminal`."""
    return Console(stderr=True, highlight=False)
