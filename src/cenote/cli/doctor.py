"""`cenote doctor`: the limits that bite, each under its name with its number, its consequence and the remedy.

It shows what `measure/doctor.py` found, and says by its exit status how bad the worst of it is.
"""

import json
import textwrap
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from cenote.cli.endings import plain_endings
from cenote.cli.instrument import AsJson, Plot, Report, Url, check_files, paper
from cenote.config import Option
from cenote.measure.doctor import Diagnosis, as_dict, examine
from cenote.measure.doctor_facts import Programs
from cenote.measure.verdict import Finding, Severity, Verdict

_COLOURS = {
    Severity.CRITICAL: "bold red",
    Severity.WARNING: "bold yellow",
    Severity.NOTE: "cyan",
    Severity.NOT_KNOWN: "dim",
    Severity.OK: "green",
}
_SEVERITY_WIDTH = len("not known") + 2


def _help(name: str) -> str:
    option: Option = Programs.__dataclass_fields__[name].metadata["option"]
    text = option.text[0].upper() + option.text[1:]
    return f"{text}{f' ({option.unit})' if option.unit else ''}."


def doctor(
    url: Url = None,
    instances: Annotated[int, typer.Option(help=_help("instances"))] = 1,
    workers: Annotated[int, typer.Option(help=_help("workers"))] = 1,
    pool_size: Annotated[int | None, typer.Option(help=_help("pool_size"))] = None,
    rate: Annotated[float | None, typer.Option(help=_help("rate"))] = None,
    knee: Annotated[int | None, typer.Option(help=_help("knee"))] = None,
    application: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=_help("application") + " They are then not counted twice."),
    ] = None,
    server_memory: Annotated[float | None, typer.Option(metavar="GIB", help=_help("server_memory"))] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help="A configuration of `cenote serve` before this server; your pools connect to it then.",
        ),
    ] = None,
    plot: Plot = None,
    report: Report = None,
    as_json: AsJson = False,
) -> None:
    """The limits that bite: each a finding with its number, its consequence and the remedy.

    It asks the server, this machine's kernel and the resolver, for a second, and changes nothing. What it may
    not or cannot see is "not known", with the reason. Limits of ports, files and queues are those of this
    machine; the server's own are known only where it runs here. What your programs may open, it has to be told:
    instances x workers x pool size.

    Every finding has a chapter in docs/doctor.md.

    \b
    Exit status: 0 all is well, or there are notes only; 3 a warning; 4 something critical;
    1 the server could not be examined; 2 wrong use; 130 Ctrl-C.

    \b
    Examples:
      cenote doctor postgresql://app@db/app
      cenote doctor service=orders --instances 12 --workers 4 --pool-size 10 --knee 40
      cenote doctor postgresql://app@db/app --config cenote.toml --plot slots.png
    """
    with plain_endings():
        programs = Programs(
            instances=instances,
            workers=workers,
            pool_size=pool_size,
            rate=rate,
            knee=knee,
            application=application,
            server_memory=server_memory,
        )
        programs.check()
        check_files(plot, report)
        diagnosis = examine(url, programs, config)
        _write_files(diagnosis, plot, report)
        if as_json:
            typer.echo(json.dumps(as_dict(diagnosis), indent=2))
        else:
            _print(diagnosis, plot, report)
    if diagnosis.exit_status:
        raise typer.Exit(diagnosis.exit_status)


def _write_files(diagnosis: Diagnosis, plot: Path | None, report: Path | None) -> None:
    if plot is None and report is None:
        return
    from cenote.measure.doctor_picture import draw, write_report

    if plot is not None:
        draw(diagnosis, plot)
    if report is not None:
        write_report(diagnosis, report)


def _print(diagnosis: Diagnosis, plot: Path | None, report: Path | None) -> None:
    console = paper()
    console.print(f"{diagnosis.facts.target.title}, seen from this machine\n")
    for finding in diagnosis.findings:
        if finding.verdict.consequence:
            _print_loud(console, finding)
    indent = " " * (_SEVERITY_WIDTH + max(len(finding.name) for finding in diagnosis.findings) + 2)
    for finding in diagnosis.findings:
        verdict = finding.verdict
        if not verdict.consequence:
            first, *more = _wrapped(console, ". ".join(filter(None, (verdict.number, verdict.remedy))), indent)
            name = finding.name.ljust(len(indent) - _SEVERITY_WIDTH)
            console.print(_severity(verdict), name, first[len(indent) :], sep="")
            for line in more:
                console.print(line)
    console.print(f"\n{summary(diagnosis)}\nEach finding is explained in docs/doctor.md under its name.")
    for what, path in (("Picture", plot), ("Report", report)):
        if path is not None:
            console.print(f"{what}: {path}")


def _print_loud(console: Console, finding: Finding) -> None:
    verdict = finding.verdict
    console.print(_severity(verdict), Text(finding.name, style="bold"), sep="")
    for words in (verdict.number, verdict.consequence, f"Remedy: {verdict.remedy}"):
        for line in _wrapped(console, words, " " * _SEVERITY_WIDTH):
            console.print(Text(line))
    console.print()


def _severity(verdict: Verdict) -> Text:
    return Text(verdict.severity.word.ljust(_SEVERITY_WIDTH), style=_COLOURS[verdict.severity])


def _wrapped(console: Console, words: str, indent: str) -> list[str]:
    return textwrap.wrap(words, console.width, initial_indent=indent, subsequent_indent=indent)


def summary(diagnosis: Diagnosis) -> str:
    """How many of each severity, the gravest first."""
    words = []
    for severity in sorted(Severity, reverse=True):
        count = diagnosis.count(severity)
        if count:
            plural = "s" if count > 1 and severity in (Severity.WARNING, Severity.NOTE) else ""
            words.append(f"{count} {severity.word}{plural}")
    return ", ".join(words)
