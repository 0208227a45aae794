"""How a verb ends when it cannot do what was asked: a message on standard error and an exit status.

2: the caller asked for what cannot be (a value, a missing package). 1: it was tried and failed. 130: Ctrl-C.
No traceback for what was foreseen; a bug still shows its own.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import typer

from cenote.errors import CenoteError, ConfigError, MissingDependency


@contextmanager
def plain_endings() -> Iterator[None]:
    """Turn foreseen exceptions into messages and exit statuses."""
    try:
        yield
    except ConfigError as error:
        for problem in error.problems:
            print(f"cenote: {problem}", file=sys.stderr)
        raise typer.Exit(2) from None
    except MissingDependency as error:
        print(f"cenote: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except CenoteError as error:
        print(f"cenote: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _leave_unsaid()
        print(f"cenote: {error.strerror}: what was found could not be written", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("cenote: interrupted", file=sys.stderr)
        raise typer.Exit(130) from None


def _leave_unsaid() -> None:
    """Nothing more goes to standard output if nothing fits there: at its end Python would complain once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def need_proxy() -> None:
    """Return when the packages of the extra `proxy` are there.

    :raises MissingDependency: naming those that are not.
    """
    missing = [name for name in ("pydantic", "psycopg", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f'the daemon needs {", ".join(missing)}, not installed here: pip install "cenote[proxy]"'
        )
