"""What a text may do, as the proxy asks, and what the parameters of a Bind add to that.

The classifier in `cenote.sql` says what a text may touch; here that becomes what has to be done about it: before
it runs, and by asking the server afterwards. Nothing here knows a client or a connection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import blake2b

from cenote.proxy.settings import ROLES
from cenote.proxy.state import CUSTOM_NAME, HELD
from cenote.sql import touch
from cenote.sql.classify import classify
from cenote.sql.verdict import DEFAULT, Assign, Verdict

#: Settings that cannot change the meaning of a text: custom ones, and those that limit, commit, log and print.
MEANINGLESS = re.compile(
    rb".*\..*|.*_timeout|.*_mem|log_.*|(?:default_)?transaction_(?:isolation|read_only|deferrable)|seed"
    rb"|synchronous_commit|application_name|client_min_messages|extra_float_digits|bytea_output",
    re.DOTALL,
)


class Reading:
    """What a text may do, as the proxy asks.

    touches, reads: flags of `cenote.sql.touch`
    copies: it may make the server read CopyData
    clears: the kinds of state that it brings back to nothing, and does nothing else; 0 for other texts
    builtin: among the settings it touches may be some of the server's own
    customs: names of custom settings it may touch
    names_at: which of its parameters are names of settings; untold: it computes names, and nobody can tell which
    resets: settings that it may take back to the server's base state, which is not the client's, and whether for
        the transaction only; `*` is all but the role
    nulls_at: of the settings that it takes back when a parameter is NULL: name (if known, else the number of the
        parameter that has it), number of that parameter (0: it is NULL), and whether for the transaction only
    alters: it may change settings that decide what a text means, be it for the transaction only
    ties: kinds of state that it may leave and that keep a connection
    unlistens: the channels it may listen to no more; `*` is all of them, an empty name what cannot be told
    ends: kinds of state that keep a connection and of which it may end the last
    hidden: it runs code that the text does not show; fingerprint: what texts that differ in literals only share
    calls: that code is called with what may be names of custom settings; said: such names in its own constants
    defines: it creates or alters what others may run
    matters: something has to be done about it before it runs
    """

    def __init__(
        self,
        touches: int,
        copies: bool = False,
        reads: int = 0,
        clears: int = 0,
        builtin: bool = False,
        customs: tuple[bytes, ...] = (),
        names_at: tuple[int, ...] = (),
        untold: bool = False,
        resets: tuple[tuple[bytes, bool], ...] = (),
        fingerprint: bytes = b"",
        ends: int = 0,
        ties: int = 0,
        unlistens: tuple[bytes, ...] = (),
        calls: bool = False,
        said: tuple[bytes, ...] = (),
        defines: bool = False,
        nulls_at: tuple[tuple[bytes, int, int, bool], ...] = (),
        alters: bool = False,
    ) -> None:
        self.touches = touches
        self.copies = copies
        self.reads = reads
        self.clears = clears
        self.builtin = builtin
        self.customs = customs
        self.names_at = names_at
        self.untold = untold
        self.resets = resets
        self.fingerprint = fingerprint
        self.ends = ends
        self.ties = ties
        self.unlistens = unlistens
        self.calls = calls
        self.said = said
        self.defines = defines
        self.nulls_at = nulls_at
        self.alters = alters
        self.hidden = fingerprint != b""
        self.matters = bool(touches or copies or resets or reads & touch.SEQUENCE)


HARMLESS = Reading(0)


def read(text: bytes) -> Reading:
    """What running `text` may touch. O(1) for what was read before, O(text) else.

    Plain texts need not come here: see `cenote.sql.plain`.

    Bytes are read as Latin-1: in every encoding a server may have, and in UTF-8, a byte below 128 is the ASCII
    character. The client encodings where it may be half of a character are refused at log-in time.
    """
    reading = _readings.get(text)
    if reading is None:
        reading = _read(text)
        if len(_readings) >= _MAX_READINGS:
            _readings.clear()
        if len(text) <= _MAX_TEXT:
            _readings[text] = reading
    return reading


_MAX_READINGS, _MAX_TEXT = 4096, 16_384
_readings: dict[bytes, Reading] = {}


def _read(text: bytes) -> Reading:
    latin = text.decode("latin-1")
    verdict = classify(latin)
    # EXECUTE needs the names to be the client's, as PREPARE does.
    touches = verdict.touches | verdict.reads & touch.PREPARED
    if _ASKS_CHANNELS in text.lower():
        touches |= touch.LISTEN  # the answer has to be the client's own
    copies = may_copy(text)
    clears = clearing(latin) if touches else 0
    hides = verdict.hidden or bool(verdict.unknown_functions)
    calls = bool(verdict.unknown_functions) or touches & touch.UNKNOWN != 0
    ends = (HELD if hides else 0) | verdict.reads & touch.CURSOR
    alters = _alters(verdict, touches)
    reads = verdict.reads | (touch.SEQUENCE if _LAST.search(text) is not None else 0)
    if not (touches or copies or ends or alters or verdict.assigns or reads & touch.SEQUENCE):
        return HARMLESS
    names = list(map(_name, verdict.settings))
    customs = [name for name in names if b"." in name]
    # RESET ALL, a computed name, code that the text does not show: any setting.
    any_setting = bool(touches & (touch.UNKNOWN | touch.SETTINGS)) and not names
    names_at: list[int] = []
    untold = False
    if any_setting:
        customs = [name.lower() for name in CUSTOM_NAME.findall(text)]
        for call in _SET_CONFIG.finditer(text):
            if call[1] is not None:
                names_at.append(int(call[1]))
            elif call[2] is None:
                untold = True
    untold = untold or len(customs) > _MAX_CUSTOMS
    return Reading(
        touches,
        copies,
        reads,
        clears,
        builtin=any_setting or len(customs) < len(names),
        customs=tuple(customs[:_MAX_CUSTOMS]),
        names_at=tuple(names_at),
        untold=untold,
        resets=_resets(text, touches, [b"*"] if any_setting else names, verdict.assigns),
        fingerprint=identity_of(text) if hides else b"",
        ends=ends,
        ties=_ties(text, verdict.touches | verdict.reads & touch.PREPARED, clears),
        unlistens=_unlistens(text, touches),
        calls=calls,
        said=_said(text) if calls else (),
        defines=verdict.defines,
        nulls_at=_nulls_at(verdict.assigns),
        alters=alters,
    )


def _alters(verdict: Verdict, touches: int) -> bool:
    """Whether this may change settings that decide what a text means."""
    if touches & touch.ROLE or (touches & touch.SETTINGS and not verdict.settings):
        return True
    if touches & touch.UNKNOWN and (verdict.verb != "EXECUTE" or verdict.statements > 1):
        return True
    names = [*verdict.settings, *(name for name, _, _ in verdict.assigns)]
    return not all(map(MEANINGLESS.fullmatch, map(_name, names)))


def _name(name: str) -> bytes:
    """A setting's name as the server has it: its bytes, or what was written as \\u0416."""
    try:
        return name.encode("latin-1")
    except UnicodeEncodeError:
        return name.encode()


def _nulls_at(assigns: tuple[Assign, ...]) -> tuple[tuple[bytes, int, int, bool], ...]:
    """The settings that go back to the base state if a parameter is NULL."""
    return tuple(
        (
            b"" if name[:1] == "$" else _name(name) or b"*",
            int(name[1:]) if name[:1] == "$" else 0,
            0 if source == DEFAULT else int(source[1:]),
            local,
        )
        for name, source, local in assigns
        if source[:1] == "$" or (source and name[:1] == "$")
    )


def _ties(text: bytes, touches: int, clears: int) -> int:
    """What of this is not only undone: to undo one lock of many touches locks, but is no reason to pin."""
    ties = touches & (HELD | touch.SEQUENCE | touch.LOAD)
    if not ties or not touches & ~clears or _UNDOES.fullmatch(text):
        return 0
    if b"advisory" not in text.lower().replace(b"pg_advisory_unlock", b""):
        ties &= ~touch.ADVISORY
    return ties


def _resets(
    text: bytes, touches: int, names: list[bytes], assigns: tuple[Assign, ...]
) -> tuple[tuple[bytes, bool], ...]:
    """The settings that this may take back to the base state, of those it touches."""
    found = {
        _name(name) or b"*": local for name, source, local in assigns if source == DEFAULT and name[:1] != "$"
    }
    if touches & (touch.SETTINGS | touch.ROLE | touch.UNKNOWN) and _RESETS.search(text) is not None:
        found.update(dict.fromkeys(names + (list(ROLES) if touches & touch.ROLE else []), False))
    return tuple(found.items())


def _unlistens(text: bytes, touches: int) -> tuple[bytes, ...]:
    """The channels that this may listen to no more."""
    if touches & touch.UNKNOWN:
        return (b"",)
    small = text.lower()
    if touches & touch.LISTEN and b"discard" in small:
        return (b"*",)
    if not touches & touch.LISTEN or not (b"unlisten" in small or _ASKS_CHANNELS in small):
        return ()
    found = []
    for quoted, word in _UNLISTEN.findall(text):
        found.append(quoted[1:-1].replace(b'""', b'"') if quoted else word.lower())
    return tuple(found) or (b"",)


_ASKS_CHANNELS = b"pg_listening_channels"
_UNLISTEN = re.compile(rb"""\bunlisten\s+(?:("(?:[^"]|"")+")|(\*|[\w$\x80-\xff]+))""", re.IGNORECASE)
_UNDOES = re.compile(rb"\s*(?:unlisten|deallocate)\b[^;]*;?\s*", re.IGNORECASE)


def fingerprint_of(text: bytes) -> bytes:
    """The text without its literals and its space, cut to a size: what one line of a program sends. O(text)"""
    return _normal(text)[:_MAX_FINGERPRINT]


def identity_of(text: bytes) -> bytes:
    """The same, told apart from others that begin alike. O(text)"""
    normal = _normal(text)
    if len(normal) <= _MAX_FINGERPRINT:
        return normal
    return normal[:_MAX_FINGERPRINT] + b" #" + blake2b(normal, digest_size=12).hexdigest().encode()


def _normal(text: bytes) -> bytes:
    return b" ".join(_LITERALS.sub(b"?", text[:_MAX_TEXT]).split())


def change(data: bytes, at: int, end: int) -> Reading:
    """What a plain UPDATE or DELETE may do, by its first words: triggers are those of a table. O(1)"""
    words = data[at : min(end, at + 160)].lower().split(None, 4)
    text = b" ".join(words[:4] if b"only" in words[1:3] else words[:3])
    reading = _changes.get(text)
    if reading is None:
        if len(_changes) >= _MAX_READINGS:
            _changes.clear()
        reading = _changes[text] = Reading(0, fingerprint=text)
    return reading


_changes: dict[bytes, Reading] = {}


def _said(text: bytes) -> tuple[bytes, ...]:
    """What looks like the name of a custom setting in the constants of a text."""
    found: dict[bytes, None] = {}
    for constant in _STRINGS.findall(text):
        found.update(dict.fromkeys(name.lower() for name in CUSTOM_NAME.findall(constant) if name.isascii()))
    return tuple(found)[:_MAX_CUSTOMS]


_STRINGS = re.compile(rb"'((?:[^']|'')*)'|\$\w*\$.*?\$\w*\$", re.DOTALL)


_LITERALS = re.compile(rb"'(?:[^']|'')*'|\b\d[\w.]*|\$\d+(?:\s*,\s*\$\d+)*|--[^\n]*")
_MAX_FINGERPRINT = 200
_RESETS = re.compile(rb"\b(?:reset|discard|default|zone\s+local)\b", re.IGNORECASE)
_SET_CONFIG = re.compile(
    rb"set_config\"?\s*\((?:\s*\$(\d+)(?:::text)?\s*,|\s*('[^']*')(?:::text)?\s*,)?", re.IGNORECASE
)
_MAX_CUSTOMS = 64
_LAST = re.compile(rb"(?:last|curr)val", re.IGNORECASE)  # in bodies, too, and in what is prepared


def bound(body: bytes, wanted: tuple[int, ...]) -> list[bytes] | None:
    """The parameters of a Bind, by its body, that have these numbers, in lower case; None: it cannot be told.
    O(parameters)"""
    values = parameters(body)
    if values is None or not all(0 < number <= len(values) for number in wanted):
        return None
    return [(values[number - 1] or b"").lower() for number in wanted]


def bound_names(body: bytes) -> list[bytes]:
    """The parameters of a Bind that look like names of custom settings. O(parameters)"""
    values = [v for v in parameters(body) or () if v is not None and len(v) <= _MAX_NAME]
    return [v.lower() for v in values if v.isascii() and CUSTOM_NAME.fullmatch(v)]


_MAX_NAME = 256


def nulled(body: bytes, wanted: tuple[tuple[bytes, int, int, bool], ...]) -> list[tuple[bytes, bool]]:
    """Of what `Reading.nulls_at` has, that which the parameters of this Bind, by its body, take back; all of it
    where they cannot be told. O(parameters)"""
    values = parameters(body)
    if values is None:
        return [(b"*" if name_at else name, local) for name, name_at, _, local in wanted]
    found = []
    for name, name_at, value_at, local in wanted:
        if max(name_at, value_at) <= len(values) and (not value_at or values[value_at - 1] is None):
            found.append(((values[name_at - 1] or b"").lower() if name_at else name, local))
    return found


def parameters(body: bytes) -> list[bytes | None] | None:
    """The parameters of a Bind, by its body; None: it cannot be told. O(parameters)"""
    try:
        at = body.index(b"\0", body.index(b"\0") + 1) + 1
        at += 2 + 2 * int.from_bytes(body[at : at + 2], "big")
        count = int.from_bytes(body[at : at + 2], "big")
        at += 2
        values: list[bytes | None] = []
        for _ in range(count):
            size = int.from_bytes(body[at : at + 4], "big", signed=True)
            at += 4
            values.append(body[at : at + size] if size >= 0 else None)
            at += max(0, size)
        return values if at <= len(body) else None
    except (ValueError, IndexError):
        return None


def executed(prepared: Iterable[tuple[bytes, bytes]], text: bytes) -> tuple[set[bytes], bool, bool]:
    """What custom settings a text may touch that executes some of these statements, prepared by SQL; whether it
    may touch others that nobody can tell; and whether it may set anything. O(texts)"""
    names: set[bytes] = set()
    untold = sets = False
    for _, inner in prepared:
        names.update(name.lower() for name in CUSTOM_NAME.findall(inner))
        for call in _SET_CONFIG.finditer(inner):
            sets = True
            # A name that is a parameter stands in the text that executes it, unless it is computed there.
            untold = untold or (call[2] is None and (call[1] is None or _CONSTANTS.search(text) is None))
    return names, untold, sets


_CONSTANT = rb"(?:'[^']*'|[\w.+-]+)\s*"
_CONSTANTS = re.compile(
    rb"\bexecute\s+(?:\"(?:[^\"]|\"\")+\"|\w+)\s*\(\s*" + _CONSTANT + rb"(?:,\s*" + _CONSTANT + rb")*\)\s*;?\s*$",
    re.IGNORECASE,
)


def may_copy(text: bytes) -> bool:
    """Whether running this may make the server read CopyData. O(text)"""
    small = text.lower()
    return b"stdin" in small and b"copy" in small


def clearing(text: str) -> int:
    """The kinds of state that this text brings back to nothing, if it does nothing else; 0 for other texts.

    Only the forms that clear all of a kind count: they are what drivers send on giving a connection back.
    """
    cleared = 0
    for statement in text.split(";"):
        words = tuple(statement.upper().replace("PG_CATALOG.", "").split())
        if words:
            kind = _CLEARING.get(words, 0)
            if not kind:
                return 0
            cleared |= kind
    # A role alone goes back to the log-in's own; only with all settings that is what DISCARD ALL does.
    return cleared if cleared & touch.SETTINGS or not cleared & touch.ROLE else 0


_CLEARING = {
    ("RESET", "ALL"): touch.SETTINGS,
    ("DISCARD", "ALL"): touch.DISCARDED,
    ("SET", "SESSION", "AUTHORIZATION", "DEFAULT"): touch.ROLE,
    ("DISCARD", "SEQUENCES"): touch.SEQUENCE,
    ("DISCARD", "TEMP"): touch.TEMP,
    ("DISCARD", "TEMPORARY"): touch.TEMP,
    ("DISCARD", "PLANS"): touch.PLANS,
    ("UNLISTEN", "*"): touch.LISTEN,
    ("CLOSE", "ALL"): touch.CURSOR,
    ("DEALLOCATE", "ALL"): touch.PREPARED,
    ("DEALLOCATE", "PREPARE", "ALL"): touch.PREPARED,
    ("SELECT", "PG_ADVISORY_UNLOCK_ALL()"): touch.ADVISORY,
}
