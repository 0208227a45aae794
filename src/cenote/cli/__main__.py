"""The door of the command line: `cenote`, or `python -m cenote.cli`.

It checks that the packages of the extra `cli` are there before anything imports them, and hands on. It knows
no verb.
"""

import os
import signal
import sys
from importlib.util import find_spec

_NEEDED = ("typer", "rich")


def main() -> None:
    """Run the command line on `sys.argv` and exit with its status."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        print(
            f"cenote: the command line needs {' and '.join(missing)}, which {verb} not installed: "
            'pip install "cenote[cli]"',
            file=sys.stderr,
        )
        sys.exit(2)
    # Who has Ctrl-C ignored, as a shell has for what it runs in the background, keeps that.
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, _end_at_once)
    from cenote.cli.app import app

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        app(prog_name="cenote")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if ours:
            signal.signal(signal.SIGINT, _end_at_once)


def _end_at_once(*_: object) -> None:
    """Ctrl-C before a verb has begun, or after it has ended: nothing is there to be put away.

    No exception, because extension modules that are being imported turn it into errors of their own, or lose it.
    """
    os.write(2, b"cenote: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
