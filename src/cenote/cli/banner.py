"""What `cenote serve` shows when it is ready: how to connect, what the bounds are, how to stop.

Lines of a label and a value, colored on a terminal, plain and flushed elsewhere. A password is shown only where
the server was made for this run.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING
from urllib.parse import quote

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from cenote.proxy.config import Config
    from cenote.proxy.daemon import Daemon

_LABEL_WIDTH = 20
_SHOWN_DATABASES = 5
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def show(daemon: Daemon, password: str) -> None:
    """Print it. `password`: of the one user, when it may be shown; "": it may not."""
    console = Console(highlight=False, soft_wrap=True)
    for label, value in lines(daemon, password):
        console.print(Text.assemble((label.ljust(_LABEL_WIDTH), "dim"), (value, "bold" if label else "dim")))
    sys.stdout.flush()


def lines(daemon: Daemon, password: str) -> list[tuple[str, str]]:
    """The labels and values, in their order."""
    from cenote.proxy.problems import CONSOLE

    config = daemon.config
    names = list(config.databases)
    users = list(config.users)
    found = [("connect to", _url(daemon, users[0], password, name)) for name in names[:_SHOWN_DATABASES]]
    if len(names) > _SHOWN_DATABASES:
        found.append(("", f"and {len(names) - _SHOWN_DATABASES} more databases"))
    if len(daemon.addresses) > 1:
        found.append(("listening on", ", ".join(daemon.addresses)))
    found += [
        ("mode", _modes(config)),
        ("server connections", _bound_in_words(config)),
        ("clients", f"at most {config.listen.max_clients:,}"),
    ]
    if config.metrics_port is not None:
        port = config.metrics_port or getattr(daemon, "metrics_port", 0)
        where = f"http://{_host(config.metrics_host)}:{port}/metrics" if port else "see metrics_served in the log"
        found.append(("metrics", where))
    if config.admin_users:
        found.append(("console (SHOW ...)", _url(daemon, config.admin_users[0], password, CONSOLE)))
    return [*found, ("", "Ctrl-C drains and stops")]


def bound(config: Config) -> int:
    """The most server connections that the configured databases and users can have together."""
    from cenote.proxy.config import pool_names, pool_options

    return sum(pool_options(config, *pool).max_size for pool in pool_names(config))


def _bound_in_words(config: Config) -> str:
    from cenote.proxy.config import pool_names, pool_options

    sizes = [pool_options(config, *pool).max_size for pool in pool_names(config)]
    if len(set(sizes)) == 1:
        pools = "1 pool" if len(sizes) == 1 else f"{len(sizes)} pools"
        return f"at most {sum(sizes):,} (max_size {sizes[0]:,} x {pools})"
    return f"at most {sum(sizes):,} (the max_size of {len(sizes)} pools together)"


def _modes(config: Config) -> str:
    from cenote.proxy.config import pool_names, pool_options

    return ", ".join(dict.fromkeys(pool_options(config, *pool).mode for pool in pool_names(config)))


def _url(daemon: Daemon, user: str, password: str, database: str) -> str:
    secret = quote(password, safe="") if password else "****"
    listen = daemon.config.listen
    login = f"postgresql://{quote(user, safe='')}:{secret}@"
    hosts = [host.strip() for host in listen.host.split(",") if host.strip()]
    more = "?sslmode=require" if listen.tls_mode == "require" else ""
    if not hosts:
        return (
            f"{login}/{quote(database, safe='')}?host={quote(listen.unix_dir or '', safe='')}&port={listen.port}"
        )
    return f"{login}{_host(hosts[0])}:{daemon.port}/{quote(database, safe='')}{more}"


def _host(host: str) -> str:
    """As it stands in a URL that can be opened from here."""
    host = _EVERYWHERE.get(host, host)
    return f"[{host}]" if ":" in host else host
