"""Why the console does not answer: an error in PostgreSQL's form."""

from __future__ import annotations


class Refusal(Exception):
    """SQLSTATE and what to say. `hint` None: the list of commands."""

    def __init__(self, sqlstate: str, text: str, hint: str | None = None, detail: str = "") -> None:
        super().__init__(text)
        self.sqlstate = sqlstate
        self.text = text
        self.hint = hint
        self.detail = detail
