"""The door of the command line: `cenote`, or `python -m cenote.cli`.

It checks that the packages of the extra `cli` are there before anything imports them, and hands on. It knows
no verb.
"""

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
    try:
        from cenote.cli.app import app

        app(prog_name="cenote")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
