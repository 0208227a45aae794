"""`cenote serve` in a process of its own: for experiments that compare ways.

It runs as a user starts it, from a configuration file, and is told nothing that he could not say. It is gone when
the block ends, however it ends, or its process; and its file, which holds a password, never had a name.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import IO

from cenote.embedded import Postgres
from cenote.errors import CenoteError, MissingDependency

_READY = "Ctrl-C drains and stops"
_START_S = 30.0
_STOP_S = 10.0
_SPARE_CLIENTS = 8


@dataclass(frozen=True, slots=True)
class Served:
    """A daemon that is ready. dsn: for its clients."""

    pid: int
    port: int
    dsn: str


def need_packages() -> None:
    """Return when the daemon can be started.

    :raises MissingDependency: naming what is not installed
    """
    missing = [name for name in ("pydantic", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f'the proxy needs {", ".join(missing)}, not installed here: pip install "cenote[embedded,proxy]"'
        )


@contextmanager
def served(server: Postgres, *, size: int, clients: int) -> Iterator[Served]:
    """A proxy before `server`, on a free port of loopback.

    :param size: server connections, opened for the first client, as an in-process pool of that size does
    :param clients: those it is to let in
    :raises CenoteError: it did not start; with its own words
    """
    with daemon(_config(server, size, clients)) as (pid, port):
        yield Served(pid, port, server.dsn.replace(f":{server.port}/", f":{port}/"))


@contextmanager
def daemon(config: str) -> Iterator[tuple[int, int]]:
    """A daemon with this configuration (TOML): its process and its port.

    :raises CenoteError: it did not start; with its own words
    """
    with ExitStack() as stack:
        words = stack.enter_context(tempfile.TemporaryFile())
        file = stack.enter_context(tempfile.TemporaryFile())
        file.write(config.encode())
        file.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cenote.measure.served", "serve", "--config", f"/dev/fd/{file.fileno()}"],
            stdin=subprocess.PIPE,  # its end is ours: the daemon goes when we are gone
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            pass_fds=(file.fileno(),),
            start_new_session=True,  # Ctrl-C in the terminal is for us, and we end it
        )
        stack.callback(_stop, process)
        yield process.pid, _port(process, words)


def _config(server: Postgres, size: int, clients: int) -> str:
    tables: dict[str, dict[str, str | int]] = {
        "listen": {"host": "127.0.0.1", "port": 0, "max_clients": clients + _SPARE_CLIENTS},
        "server": {"max_connections": size},
        "pool": {"min_size": size, "max_size": size},
        f"databases.{server.database}": {"host": server.host, "port": server.port, "sslmode": "disable"},
        f"users.{server.user}": {"password": server.password},
    }
    # A string or number of JSON is one of TOML.
    return "\n".join(
        f"[{table}]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
        for table, values in tables.items()
    )


def _port(process: "subprocess.Popen[str]", words: IO[bytes]) -> int:
    """The port of its banner, whose last line says that it is ready."""
    assert process.stdout is not None
    watchdog = threading.Timer(_START_S, process.kill)
    watchdog.start()
    try:
        banner = ""
        for line in process.stdout:
            banner += line
            if _READY in line:
                break
    finally:
        watchdog.cancel()
    found = re.search(r"^connect to .*:(\d+)/", banner, re.MULTILINE)
    if _READY not in banner or found is None:
        process.kill()
        process.wait()
        words.seek(0)
        said = " ".join(f"{banner} {words.read().decode(errors='replace')}".split())
        raise CenoteError(f"the proxy did not start: {said or 'it said nothing'}")
    return int(found[1])


def _stop(process: "subprocess.Popen[str]") -> None:
    try:
        process.communicate(timeout=_STOP_S)  # closes its standard input, which ends it
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def _end_with_parent() -> None:
    """Wait for the end of standard input, which whoever started us keeps open; then stop as on Ctrl-C."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    from cenote.cli.__main__ import main

    threading.Thread(target=_end_with_parent, daemon=True).start()
    main()
