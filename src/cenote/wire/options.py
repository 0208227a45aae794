"""The startup parameter `options`: a command line of the server, read as PostgreSQL reads it.

It follows pg_split_opts, getopt of the GNU C library (which steps over words that are no switches and complains
of them last) and process_postgres_switches. It maps switches to settings; whether a setting exists, and whether
a client may change it, is for the server to say.
"""

from __future__ import annotations

import re

from cenote.wire.refusal import Refusal

_SPACE = b" \t\n\v\f\r"

# -X value sets a setting to the value.
_VALUES = {
    "B": b"shared_buffers",
    "h": b"listen_addresses",
    "k": b"unix_socket_directories",
    "N": b"max_connections",
    "p": b"port",
    "S": b"work_mem",
    "W": b"post_auth_delay",
}
# -X alone sets a setting.
_SWITCHES = {
    "e": (b"datestyle", b"euro"),
    "F": (b"fsync", b"false"),
    "i": (b"listen_addresses", b"*"),
    "l": (b"ssl", b"true"),
    "O": (b"allow_system_table_mods", b"true"),
    "P": (b"ignore_system_indexes", b"true"),
    "s": (b"log_statement_stats", b"true"),
}
# What only the server's own command line may say is read and does nothing.
_IGNORED_VALUES = "CDrv"
_IGNORED_SWITCHES = "bEjnT"

_PLANS = {
    b"s": b"enable_seqscan",
    b"i": b"enable_indexscan",
    b"o": b"enable_indexonlyscan",
    b"b": b"enable_bitmapscan",
    b"t": b"enable_tidscan",
    b"n": b"enable_nestloop",
    b"m": b"enable_mergejoin",
    b"h": b"enable_hashjoin",
}
_PROGRAMS = (b"check", b"boot", b"describe-config", b"single")  # --X asks for another program, and must be first

Settings = list[tuple[bytes, bytes]]


def parse_options(text: bytes) -> Settings:
    """The settings that a command line asks for, in order, names as often as they came.

    :raises Refusal: it cannot be understood (42601, in PostgreSQL's words), or sets what has no name (42704).
        PostgreSQL sets what comes before the error first, and may complain of that; this reads the whole line.
    """
    words = split_options(text)
    settings: Settings = []
    strangers: list[bytes] = []
    at = 0
    while at < len(words):
        word = words[at]
        if word == b"--":
            strangers += words[at + 1 :]
            break
        if word[:1] != b"-" or len(word) == 1:
            strangers.append(word)
            at += 1
            continue
        before = [b"postgres", *words[:at]][-1] if not strangers else strangers[-1]
        at = _read_word(words, at, before, settings)
    if strangers:
        raise _invalid(strangers[0])
    return settings


def split_options(text: bytes) -> list[bytes]:
    """The words of a command line: divided by spaces; a backslash takes the meaning of what follows it."""
    words = []
    word: bytearray | None = None
    escaped = False
    for byte in text.lstrip(_SPACE):
        if byte in _SPACE and not escaped:
            if word is not None:
                words.append(bytes(word))
            word = None
            continue
        if word is None:
            word = bytearray()
        if byte == ord("\\") and not escaped:
            escaped = True
            continue
        escaped = False
        word.append(byte)
    if word is not None:
        words.append(bytes(word))
    return words


def _read_word(words: list[bytes], at: int, before: bytes, settings: Settings) -> int:
    """Read the switches in `words[at]`; return where the next word is.

    `before` is what PostgreSQL names for an unknown letter inside a word: getopt has not stepped on yet.
    """
    word = words[at]
    at += 1
    for end, letter in enumerate(word[1:].decode("latin-1"), 2):
        if letter in _SWITCHES:
            settings.append(_SWITCHES[letter])
        elif letter in "cdft-" or letter in _VALUES or letter in _IGNORED_VALUES:
            value = word[end:]
            if not value:
                if at == len(words):
                    raise _invalid(word)
                value = words[at]
                at += 1
            settings += _settings_of(letter, value, words[at - 1])
            break
        elif letter not in _IGNORED_SWITCHES:
            raise _invalid(word if end == len(word) else before)
    return at


def _settings_of(letter: str, value: bytes, word: bytes) -> Settings:
    """What a switch with a value sets. `word` is where the value stood."""
    if letter in "c-":
        return [_long_option(letter, value)]
    if letter == "d":
        return _debug_settings(value)
    if letter == "f":
        name = _PLANS.get(value[:1])
        if name is None:
            raise _invalid(word)
        return [(name, b"false")]
    if letter == "t":
        for start, name in ((b"pa", b"parser"), (b"pl", b"planner"), (b"e", b"executor")):
            if value.startswith(start):
                return [(b"log_%s_stats" % name, b"true")]
        raise _invalid(word)
    return [(_VALUES[letter], value)] if letter in _VALUES else []


def _long_option(letter: str, text: bytes) -> tuple[bytes, bytes]:
    shown = text.decode("utf-8", "replace")
    if letter == "-" and text in _PROGRAMS:
        raise Refusal("42601", f"--{shown} must be first argument")
    name, equals, value = text.partition(b"=")
    if not equals:
        raise Refusal("42601", f"{'--' if letter == '-' else '-c '}{shown} requires a value")
    if not name:  # as a startup parameter it would be read as the end of the packet
        raise Refusal("42704", 'unrecognized configuration parameter ""')
    return name.replace(b"-", b"_"), value


def _debug_settings(text: bytes) -> Settings:
    number = re.match(rb"[ \t\n\v\f\r]*([+-]?[0-9]{1,9})", text)
    level = int(number[1]) if number else 0
    if level <= 0:
        return [(b"log_min_messages", b"notice")]
    settings = [(b"log_min_messages", b"debug%d" % level)]
    if level >= 2:
        settings.append((b"log_statement", b"all"))
    for least, what in ((3, b"parse"), (4, b"plan"), (5, b"rewritten")):
        if level >= least:
            settings.append((b"debug_print_%s" % what, b"true"))
    return settings


def _invalid(word: bytes) -> Refusal:
    return Refusal(
        "42601",
        f"invalid command-line argument for server process: {word.decode('utf-8', 'replace')}",
        hint='Try "postgres --help" for more information.',
    )
