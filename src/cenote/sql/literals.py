"""The values of SQL literals and identifiers, decoded from their text as PostgreSQL does.

Takes one token of the lexer, of kind STRING, WORD or QUOTED. It refuses to guess: where the value cannot be
told or the server would refuse it, the answer is None.
"""

import re

from cenote.sql.lexer import continuation

_HEX = "[0-9A-Fa-f]"
# Byte escapes are bytes of the server's encoding, which is taken to be UTF-8.
_ESCAPE = re.compile(rf"\\(?:([0-7]{{1,3}})|x({_HEX}{{1,2}})|u({_HEX}{{4}})|U({_HEX}{{8}})|(.))", re.DOTALL)
_LETTERS = {"b": b"\b", "f": b"\f", "n": b"\n", "r": b"\r", "t": b"\t"}
_UPPER_TO_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}
_MAX_NAME_BYTES = 63


def fold(name: str) -> str:
    """`name` in lower case as the server does it: the ASCII letters only."""
    return name.lower() if name.isascii() else name.translate(_UPPER_TO_LOWER)


def identifier(raw: str, escape: str = "\\") -> str | None:
    """The name that an identifier token stands for, cut at 63 bytes; `escape` is the UESCAPE character."""
    if raw[0] == '"':
        name: str | None = raw[1:-1].replace('""', '"')
    elif raw[1:3] == '&"':
        name = _unicode(raw[3:-1].replace('""', '"'), escape)
    else:
        name = fold(raw)
    if name is None or len(name) * 4 <= _MAX_NAME_BYTES:
        return name
    encoded = name.encode("utf-8", "replace")
    return encoded[:_MAX_NAME_BYTES].decode("utf-8", "ignore")


def string(raw: str, conforming: bool = True, escape: str = "\\") -> str | None:
    """The value of a string token; None for bit strings and for what the server would refuse."""
    if raw[0] == "$":
        tag = raw.index("$", 1) + 1
        return raw[tag:-tag]
    prefix, first = raw[0].lower(), raw.index("'") + 1
    if prefix in "bx":
        return None
    content = _joined(raw, first, escapes=prefix == "e" or not (conforming or prefix == "u"))
    if prefix == "e" or (prefix in "'n" and not conforming):
        return _backslashes(content)
    content = content.replace("''", "'")
    return _unicode(content, escape) if prefix == "u" else content


def _joined(raw: str, j: int, escapes: bool) -> str:
    """What stands between the quotes, the parts of a continued string put together, '' still double."""
    parts, first, n = [], j, len(raw)
    while j < n:
        if escapes and raw[j] == "\\":
            j += 2
        elif raw[j] != "'":
            j += 1
        elif j + 1 < n and raw[j + 1] == "'":
            j += 2
        else:
            parts.append(raw[first:j])
            j = first = continuation(raw, j + 1, n)
            if j < 0:
                break
    return "".join(parts)


def _backslashes(content: str) -> str | None:
    value, last = bytearray(), 0
    high = 0  # the first half of a surrogate pair
    content = _unquote(content)
    for match in _ESCAPE.finditer(content):
        between = content[last : match.start()]
        if high and between:
            return None
        value += between.encode("utf-8", "replace")
        last = match.end()
        octal, hexadecimal, short, long, other = match.groups()
        code = short or long
        if code:
            point = int(code, 16)
            if high:
                if not 0xDC00 <= point <= 0xDFFF:
                    return None
                point = 0x10000 + ((high - 0xD800) << 10) + (point - 0xDC00)
                high = 0
            elif 0xD800 <= point <= 0xDBFF:
                high = point
                continue
            if not _valid(point):
                return None
            value += chr(point).encode()
        elif high or other in ("u", "U"):
            return None
        elif octal:
            value.append(int(octal, 8) & 0xFF)
        elif hexadecimal:
            value.append(int(hexadecimal, 16))
        else:
            value += _LETTERS.get(other) or other.encode("utf-8", "replace")
    if high:
        return None
    value += content[last:].encode("utf-8", "replace")
    try:
        return None if 0 in value else value.decode()
    except UnicodeDecodeError:
        return None


def _unquote(content: str) -> str:
    """'' made ' outside of backslash escapes, kept apart from an escaped quote before it."""
    if "''" not in content:
        return content
    return re.sub(r"\\.|''", lambda m: m[0] if m[0][0] == "\\" else "'", content, flags=re.DOTALL)


def _unicode(content: str, escape: str) -> str | None:
    if escape not in content:
        return content
    mark = re.escape(escape)
    units: list[int] = []
    pattern = re.compile(rf"{mark}(?:({_HEX}{{4}})|\+({_HEX}{{6}})|({mark})|())|(.)", re.DOTALL)
    high = 0
    for match in pattern.finditer(content):
        short, long, doubled, bad, plain = match.groups()
        if bad is not None:
            return None
        point = int(short or long, 16) if short or long else ord(doubled or plain)
        if high:
            if not ((short or long) and 0xDC00 <= point <= 0xDFFF):
                return None
            point = 0x10000 + ((high - 0xD800) << 10) + (point - 0xDC00)
            high = 0
        elif (short or long) and 0xD800 <= point <= 0xDBFF:
            high = point
            continue
        if not _valid(point):
            return None
        units.append(point)
    return None if high else "".join(map(chr, units))


def _valid(point: int) -> bool:
    return 0 < point <= 0x10FFFF and not 0xD800 <= point <= 0xDFFF
