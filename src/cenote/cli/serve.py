"""`cenote serve`: the daemon in the foreground, from a URL, a file, or with a private server of its own.

It gathers what was said into one configuration, shows how to connect, and serves until Ctrl-C. What the options
mean and allow is in `proxy/config.py`; they are None here where nothing was said.
"""

import contextlib
import errno
import re
import resource
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cenote.cli.banner import bound, show
from cenote.cli.endings import need_proxy, plain_endings
from cenote.errors import ConfigError

if TYPE_CHECKING:
    from cenote.proxy.config import Config
    from cenote.proxy.daemon import Daemon

# Command line option: where it stands in a configuration.
_PLACES = {
    "host": ("listen", "host"),
    "port": ("listen", "port"),
    "unix_dir": ("listen", "unix_dir"),
    "max_clients": ("listen", "max_clients"),
    "tls_cert": ("listen", "tls_cert"),
    "tls_key": ("listen", "tls_key"),
    "mode": ("pool", "mode"),
    "observe": ("pool", "observe"),
    "max_size": ("pool", "max_size"),
    "metrics_port": ("metrics_port",),
    "log_format": ("log_format",),
    "log_level": ("log_level",),
}
# Files that are open beside connections: libraries, logs, the event loop's own, and some to spare.
_OTHER_FILES = 64


def serve(
    url: Annotated[
        str | None, typer.Argument(metavar="[URL]", help="The server, as libpq takes it: URL or key=value.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="A configuration file (TOML).")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Addresses to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one. [default: 6432]")] = None,
    unix_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Also listen on a Unix socket in this directory.")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            metavar="MODE",
            help="When a client gives its connection back: transaction (the default), session, statement.",
        ),
    ] = None,
    observe: Annotated[
        bool | None,
        typer.Option(
            "--observe",
            help="Dry run: session mode (implied), and count what transaction mode would carry, pin or refuse; "
            "`cenote report` reads it.",
        ),
    ] = None,
    max_size: Annotated[
        int | None, typer.Option(help="Server connections of each pool, at most. [default: 10]")
    ] = None,
    max_clients: Annotated[int | None, typer.Option(help="Clients at once, at most. [default: 10000]")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve metrics there; 0 takes a free port. [default: not served]")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificate for clients, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key, PEM.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json. [default: text]")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning, error. [default: info]")] = None,
) -> None:
    """Serve PostgreSQL clients from a few server connections, until Ctrl-C.

    Without URL and file it starts a private PostgreSQL, gone afterwards, and pools that.

    \b
    Examples:
      cenote serve                                  try it: nothing to install or configure
      cenote serve postgresql://app:secret@db/app   one database, one user
      cenote serve "" --max-size 20                 all from PGHOST, PGUSER, PGSERVICE...
      cenote serve --config cenote.toml             databases and users of a file
      cenote serve --config cenote.toml --observe   what would change in transaction mode?
      cenote check-config --sample > cenote.toml    a file to begin with

    A URL is read as libpq reads it; a password that is not in it comes from PGPASSWORD or ~/.pgpass.
    Options win over the file. Ctrl-C lets running transactions end and stops; a second one stops at once.
    SIGHUP, or RELOAD on the console, reads the file again; nobody is disconnected. Without a file it is Ctrl-C.
    """
    given = {key: value for key, value in locals().items() if key in _PLACES and value is not None}
    if observe:
        given.setdefault("mode", "session")
    with plain_endings():
        need_proxy()
        if url is not None and config is not None:
            raise ConfigError(["a URL and --config: give one of them; the file says where the servers are"])
        with _options_named(given), _source(url, config, _tables(given)) as (found, shown):
            _run(found, shown, config, given)


def _tables(given: dict[str, Any]) -> dict[str, Any]:
    """The options as the tables of a configuration."""
    tables: dict[str, Any] = {}
    for option, value in given.items():
        *above, key = _PLACES[option]
        table = tables
        for name in above:
            table = table.setdefault(name, {})
        table[key] = value
    return tables


@contextlib.contextmanager
def _source(url: str | None, file: Path | None, tables: dict[str, Any]) -> Iterator[tuple["Config", str]]:
    """The configuration, and the password that may be shown ("" for none), while its server is there."""
    from cenote.proxy.config import config_of
    from cenote.proxy.url import config_of_url, merged

    if file is not None:
        yield _of_file(file, tables), ""
    elif url is not None:
        yield config_of_url(url, **tables), ""
    else:
        from cenote.embedded import Postgres

        server = Postgres()
        # Before the server is started: wrong options are told at once.
        config_of(merged(_private(server, 1), tables), complete=True)
        with server:
            values = merged(_private(server, server.port), tables)
            yield config_of(values, complete=True), server.password


def _of_file(file: Path, tables: dict[str, Any]) -> "Config":
    from cenote.proxy.config import config_of, read_tables
    from cenote.proxy.url import merged

    values = read_tables(file)
    for option in tables.get("pool", {}):
        _not_below(values, option)
    return config_of(merged(values, tables), file=str(file), complete=True)


def _again(file: Path, given: dict[str, Any]) -> "Config":
    """What a reload reads: the file as it is now, and the options that this process was started with."""
    with _options_named(given):
        return _of_file(file, _tables(given))


def _not_below(values: dict[str, Any], option: str) -> None:
    """Drop an option of [pool] that was given from the sections that would override it."""
    for name in ("databases", "users"):
        sections = values.get(name)
        for section in sections.values() if isinstance(sections, dict) else ():
            if isinstance(section, dict):
                section.pop(option, None)


def _private(server: Any, port: int) -> dict[str, Any]:
    return {
        "databases": {server.database: {"host": server.host, "port": port, "sslmode": "disable"}},
        "users": {server.user: {"password": server.password}},
        "admin_users": [server.user],
    }


def _run(config: "Config", password: str, file: Path | None, given: dict[str, Any]) -> None:
    from cenote.proxy.daemon import run
    from cenote.proxy.log import start_logging
    from cenote.proxy.problems import warnings_of

    start_logging(config.log_level, config.log_format)
    for warning in [*warnings_of(config), *_too_few_files(config)]:
        print(f"cenote: warning: {warning}", file=sys.stderr, flush=True)
    seen: list[Daemon] = []

    def ready(daemon: "Daemon") -> None:
        seen.append(daemon)
        if file is not None:
            daemon.config_path, daemon.read_config = file, lambda: _again(file, given)
        show(daemon, password)

    begun = time.monotonic()
    try:
        run(config, ready)
    except OSError as error:
        if seen:
            raise
        text = str(error.strerror or error).removeprefix("cenote: ")
        if isinstance(error, socket.gaierror):
            text = f"{config.listen.host}: {text}"
        option = "--metrics-port" if "metrics" in text else "--port"
        mend = (
            f"; choose another port with {option} (0 takes a free one)" if error.errno == errno.EADDRINUSE else ""
        )
        print(f"cenote: cannot listen: {text}{mend}", file=sys.stderr)
        raise typer.Exit(1) from None
    for daemon in seen:
        served = daemon.logins.count()
        refused = sum(daemon.login_failures.values())
        print(
            f"cenote: stopped after {time.monotonic() - begun:.1f} s; "
            f"{served} log-in{'' if served == 1 else 's'} of clients, {refused} refused",
            flush=True,
        )


def _too_few_files(config: "Config") -> Iterator[str]:
    """Each connection is an open file, and the limit of the process is raised only as far as it may be."""
    clients, servers = config.listen.max_clients, bound(config)
    needed = clients + servers + _OTHER_FILES
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        yield (
            f"{clients} clients (max_clients) and {servers} server connections need {needed} open files, and this "
            f"process may have {hard}: raise its limit (ulimit -Hn) or lower max_clients"
        )


@contextlib.contextmanager
def _options_named(given: dict[str, Any]) -> Iterator[None]:
    """Problems of values that came from the command line name the option, not the key or the file."""
    names = {".".join(_PLACES[option]): f"--{option.replace('_', '-')}" for option in given}
    try:
        yield
    except ConfigError as error:
        problems = []
        for problem in error.problems:
            for key, option in names.items():
                found = re.match(rf"(?:.*?: )?{re.escape(key)}(?= =|:)", problem)
                if found:
                    problem = option + problem[found.end() :]
                    break
            problems.append(problem)
        raise ConfigError(problems) from None
