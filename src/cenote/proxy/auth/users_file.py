"""A file of users and their secrets, in the form of PgBouncer's userlist.txt.

A line has a user's name and its secret, both in double quotes, with a quote inside written twice; what follows
means nothing, and a line that begins with a semicolon is a comment. It tells all problems with their lines and
never shows a secret. Other files are not read.

Source: PgBouncer documentation, "Authentication file format".
"""

from __future__ import annotations

import re
from pathlib import Path

from cenote.errors import ConfigError
from cenote.proxy.auth.lines import read_text
from cenote.wire.scram import Verifier

_QUOTED = r'"((?:[^"]|"")*)"'
_LINE = re.compile(rf"\s*{_QUOTED}\s*{_QUOTED}(?:\s.*)?")
_NAME_BYTES = 63  # a longer name is cut before anybody looks for it
_VERIFIER = "SCRAM-SHA-256$"


def load_users(path: Path) -> dict[str, str]:
    """The secrets of a file by user; "" where it has none.

    :raises ConfigError: with every problem.
    """
    return parse_users(read_text(path), str(path))


def parse_users(text: str, file: str) -> dict[str, str]:
    """The same of a text.

    :raises ConfigError: with every problem, each with file and line.
    """
    users: dict[str, str] = {}
    lines: dict[str, int] = {}
    problems = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.lstrip().startswith(";"):
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            problems.append(f'{file}:{number}: not of the form "user" "secret", a quote inside written twice')
            continue
        user, secret = (part.replace('""', '"') for part in found.groups())
        problem = _problem(user, secret)
        if user in lines:
            problem = f'user "{user}" is on line {lines[user]} already'
        if problem:
            problems.append(f"{file}:{number}: {problem}")
        lines.setdefault(user, number)
        users.setdefault(user, secret)
    if problems:
        raise ConfigError(problems)
    return users


def _problem(user: str, secret: str) -> str:
    """What is wrong with a line of the right form; "": nothing."""
    if not user:
        return "a user without a name"
    if len(user.encode()) > _NAME_BYTES:
        return f'user "{user}": PostgreSQL\'s names have {_NAME_BYTES} bytes at most'
    if "\0" in user + secret:
        return "a zero byte"
    if secret.startswith(_VERIFIER):
        try:
            Verifier.parse(secret)
        except ValueError as error:
            return f'user "{user}": {error}'
    return ""
