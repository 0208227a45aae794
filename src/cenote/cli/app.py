"""The verbs put together: what `cenote --help` shows. Each verb is in its own file; nothing is done here."""

import platform
from typing import Annotated

import typer

from cenote._build import is_compiled
from cenote._version import __version__
from cenote.cli.check_config import check_config
from cenote.cli.cost import cost
from cenote.cli.demo import demo
from cenote.cli.doctor import doctor
from cenote.cli.options import options
from cenote.cli.report import report
from cenote.cli.serve import serve
from cenote.cli.size import size
from cenote.cli.storm import storm

_HELP = """A connection pool for PostgreSQL.

Opening a connection costs a process on the server and several times a short query; the server refuses
beyond max_connections. A pool opens a few connections, once, and lends them.

In a program:

    import cenote

    pool = cenote.Pool("postgresql://...", max_size=10)

    pool.fetch_value("SELECT 1")

For any driver in any language, as a daemon before the server (without a URL: a private server to try it):

    cenote serve postgresql://...

Is a running daemon ready for transaction mode, and what pins its clients:

    cenote report postgresql://admin@127.0.0.1:6432/cenote

See what that changes, on a private server, in under a minute:

    cenote demo

Take a connection to your server apart, phase by phase, and see what a pool would save:

    cenote cost postgresql://...

Measure how many connections serve your queries best (without a URL: on a private server):

    cenote size postgresql://... --sql "SELECT ..."

See what happens when thousands of clients arrive at once (simulated; no server needed):

    cenote storm thousand-functions

Which limits bite on your server, on the way to it and on this machine, and what to do:

    cenote doctor postgresql://...
"""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve)
app.command("check-config")(check_config)
app.command()(demo)
app.command()(report)
app.command()(cost)
app.command()(doctor)
app.command()(options)
app.command()(size)
app.command()(storm)


def _version(asked: bool) -> None:
    if asked:
        core = "compiled" if is_compiled() else "pure Python"
        typer.echo(f"cenote {__version__} (Python {platform.python_version()}, core: {core})")
        raise typer.Exit


@app.callback(help=_HELP)
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Version, Python, and how the core was built."
        ),
    ] = False,
) -> None:
    pass
