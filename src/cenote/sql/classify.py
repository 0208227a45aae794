"""Which session state may this text touch? The one question of `cenote.sql`, with its answers cached.

The in-process pools and the proxy ask before a text is sent. It refuses to see what a text does not show
(triggers, function bodies, views): `Verdict.hidden` and `Verdict.unknown_functions` say where to look.
"""

import os
import re
import threading

from cenote.sql.scan import scan
from cenote.sql.verdict import Verdict

_MAX_CACHED_TEXT = 16_384
_PLAIN_TEXTS, _MAX_PLAIN_TEXT = 1_024, 256

# Texts with literals in them hardly repeat. Most are of a kind that needs no reading: with no parenthesis
# there is no call, with no `;` but the last no second statement, and what is left out of the class
# (backslash, dollar, double quote, &, slash, --) cannot start a token that reads otherwise. INSERT may have
# parentheses around its columns and its rows.
_SPACE = r"[ \t\r\n]"
_ANY = r"(?:[A-Za-z0-9_ \t\r\n.,=<>*+:%|\[\]]++|'[^'\\\x00]*+'|-(?!-))*+"
# Only the verbs ignore case: for the whole pattern it would double the time.
# `pg_settings` sets what it is updated to.
_UPDATE = rf"(?i:update(?!{_SPACE}+(?:pg_|only)))"
_PLAIN = re.compile(rf"(?:((?i:select))|({_UPDATE})|((?i:delete))){_SPACE}{_ANY};?{_SPACE}*", re.ASCII)
_PLAIN_INSERT = re.compile(
    rf"insert{_SPACE}++into{_SPACE}++[a-z0-9_.]++{_SPACE}*+(?:\([a-z0-9_, \t\r\n]*+\){_SPACE}*+)?"
    rf"values{_SPACE}*+\({_ANY}\)(?:{_SPACE}*+,{_SPACE}*+\({_ANY}\))*+{_SPACE}*+;?{_SPACE}*",
    re.IGNORECASE | re.ASCII,
)
_PLAIN_VERDICTS = (
    Verdict(verb="INSERT", hidden=True),
    Verdict(verb="SELECT"),
    Verdict(verb="UPDATE", hidden=True),
    Verdict(verb="DELETE", hidden=True),
)


def _plain(text: str) -> Verdict | None:
    """The verdict on a text that needs no reading, None on any other."""
    match = _PLAIN.fullmatch(text)
    if match is not None:
        # SELECT ... INTO TEMP has no parenthesis either.
        return None if match[1] and "into" in text.lower() else _PLAIN_VERDICTS[match.lastindex or 0]
    return _PLAIN_VERDICTS[0] if _PLAIN_INSERT.fullmatch(text) else None


class Classifier:
    """The classifier with a cache of its own, bounded by `entries` and by `characters` of text.

    The cache is a least-recently-used one in two generations: a hit reads one dictionary, takes no lock
    and moves nothing. New answers go to the young one; when it is full it becomes the old one, and what is
    asked for again comes back from there, so whatever was used within the last half of the bound stays.
    Safe to call from many threads, with and without the GIL: reading a dictionary is atomic, and
    whoever changes one holds the lock.

    Plain texts have a small dictionary of their own, emptied when full: the expression that knows them costs
    2 us right after a round trip, and texts with literals must not push out what took long to read.
    """

    __slots__ = ("_characters", "_entries", "_lock", "_old", "_plain", "_young", "_young_characters")

    def __init__(self, entries: int = 4096, characters: int = 4_194_304) -> None:
        self._entries = max(1, entries // 2)
        self._characters = characters // 2
        self._lock = threading.Lock()
        self._young: dict[str, Verdict] = {}
        self._old: dict[str, Verdict] = {}
        self._young_characters = 0
        self._plain: dict[str, Verdict] = {}

    def classify(self, text: str) -> Verdict:
        """What running `text` may do to the session; never raises, whatever the text."""
        return self._young.get(text) or self._plain.get(text) or self._classify(text)

    def _classify(self, text: str) -> Verdict:
        verdict = self._old.get(text)
        if verdict is None:
            verdict = _plain(text)
            if verdict is not None:
                if len(text) <= _MAX_PLAIN_TEXT:
                    if len(self._plain) >= _PLAIN_TEXTS:
                        self._plain = {}
                    self._plain[text] = verdict
                return verdict
            verdict = scan(text)
            if len(text) > _MAX_CACHED_TEXT:
                return verdict
        with self._lock:
            if len(self._young) >= self._entries or self._young_characters + len(text) > self._characters:
                self._old = self._young
                self._young = {}
                self._young_characters = 0
            if text not in self._young:
                self._young_characters += len(text)
                self._young[text] = verdict
        return verdict

    def renew_lock(self) -> None:
        """In a forked child: another thread of the parent may have held it."""
        self._lock = threading.Lock()

    def cached(self) -> tuple[int, int]:
        """How many texts are cached, and how many characters they have together."""
        with self._lock:
            texts = {**self._old, **self._young}
        return len(texts), sum(map(len, texts))


_shared = Classifier()
classify = _shared.classify
os.register_at_fork(after_in_child=_shared.renew_lock)
