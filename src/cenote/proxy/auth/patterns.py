"""Regular expressions of the rules: those that mean the same to PostgreSQL and to Python, and end in good time.

Python tries alternatives one after the other, and a stranger chooses the name that it tries them on: what could
take forever is refused, as is what the two read differently. Names have at most 63 bytes.
"""

from __future__ import annotations

import re

# What may follow a backslash: a class, an end, a group, and what is no letter or digit: it stands for itself.
_ESCAPES = frozenset("dDsSwWAZ123456789")
_GROUPS = ("(?:", "(?=", "(?!", "(?<=", "(?<!")
_SETS = ("--", "&&", "||", "~~")
_REPEAT = re.compile(r"[*+?]\??|\{\d+(?:,\d*)?\}\??")
_FIXED = re.compile(r"\{\d+\}\??")
# Each repetition multiplies the ways to try by the length of the name.
_MAX_REPEATS = 5


def pattern(text: str) -> re.Pattern[str]:
    """Compile the expression, to be searched for anywhere in a name.

    :raises ValueError: it is not one, or none that is taken here.
    """
    found = _Scanner(text).translated()
    try:
        return re.compile(found, re.ASCII | re.DOTALL)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None


class _Scanner:
    """Goes through one expression."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.out: list[str] = []
        self.repeats = 0
        #: For each group that is open, and for the whole: whether there is more than one way through it.
        self.ways = [False]
        self.closed = False  # what stands right before has more than one way

    def translated(self) -> str:
        """The expression for Python."""
        if "\0" in self.text:
            raise ValueError("it has a zero in it")
        if self.text.startswith("(?i)"):
            self._take(4)
        while self.at < len(self.text):
            self._step(self.text[self.at])
        return "".join(self.out)

    def _step(self, char: str) -> None:
        repeat = _REPEAT.match(self.text, self.at)
        if repeat is not None:
            self._repeat(repeat[0])
            return
        self.closed = False
        if char == "\\":
            self._escape()
        elif char == "[":
            self._set()
        elif char == "(":
            opening = next((group for group in _GROUPS if self.text.startswith(group, self.at)), "(")
            if opening == "(" and self.text.startswith("(?", self.at):
                raise ValueError(f"{self.text[self.at : self.at + 4]} is not taken here")
            self.ways.append(False)
            self._take(len(opening))
        elif char == ")":
            if len(self.ways) == 1:
                raise ValueError("a ) without its (")
            self.closed = self.ways.pop()
            self.ways[-1] = self.ways[-1] or self.closed
            self._take(1)
        elif char == "$":
            self._take(1, r"\Z")  # Python's $ is also before a last line's end, and a name may have one
        else:
            if char == "|":
                self.ways[-1] = True
            elif char == "{":
                raise ValueError("a { that repeats nothing; write \\{")
            self._take(1)

    def _repeat(self, repeat: str) -> None:
        if self.closed and not repeat.startswith("?"):
            raise ValueError("a repetition of what repeats or has alternatives could take forever")
        if not _FIXED.fullmatch(repeat):
            self.repeats += 1
            self.ways[-1] = True
        if self.repeats > _MAX_REPEATS:
            raise ValueError(f"more than {_MAX_REPEATS} repetitions could take forever")
        self.closed = True
        self._take(len(repeat))

    def _escape(self) -> None:
        char = self.text[self.at + 1 : self.at + 2]
        if not char:
            raise ValueError("a \\ at the end")
        if char.isalnum() and char not in _ESCAPES:
            raise ValueError(f"\\{char} is not taken here")
        self._take(2)

    def _set(self) -> None:
        """A bracket expression: what stands between is one character."""
        start = self.at
        at = start + 1 + (self.text[start + 1 : start + 2] == "^")
        at += self.text[at : at + 1] == "]"
        while at < len(self.text) and self.text[at] != "]":
            if self.text[at] == "[" or self.text[at : at + 2] in _SETS:
                raise ValueError(f"{self.text[at : at + 2]} inside of [ ] is not taken here")
            if self.text[at] == "\\":
                char = self.text[at + 1 : at + 2]
                if char.isalnum() and char not in "dswDSW":
                    raise ValueError(f"\\{char} inside of [ ] is not taken here")
                at += 1
            at += 1
        if at >= len(self.text):
            raise ValueError("a [ without its ]")
        self._take(at + 1 - start)

    def _take(self, count: int, instead: str = "") -> None:
        self.out.append(instead or self.text[self.at : self.at + count])
        self.at += count
