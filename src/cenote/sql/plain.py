"""Texts that need no reading: the few forms that hardly repeat and are known at a glance, as bytes.

With no parenthesis there is no call, with no `;` but the last no second statement; and what is left out
(backslash, double quote, slash, &, --, and a dollar that is not a parameter's) cannot start a token that reads
otherwise. It only says "plain" or "ask the classifier", and is written for C: one comparison a byte.
"""

from __future__ import annotations


def _table() -> bytes:
    allowed = bytearray(256)
    for code in b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_ \t\r\n.,=<>*+:%|[]":
        allowed[code] = 1
    return bytes(allowed)


_ALLOWED = _table()
_SELECT, _UPDATE, _DELETE = b"select", b"update", b"delete"


def plain(data: bytes, start: int, end: int) -> bool:
    """Whether `data[start:end]` is a plain SELECT, UPDATE, DELETE, BEGIN, COMMIT, END or ROLLBACK. O(bytes).

    INSERT needs parentheses, so it goes to the classifier, which has its own glance for it.
    """
    n = end
    if n - start < 3 or n - start > 4096:
        return False
    p = data
    first = p[start] | 0x20
    if first == 0x73:
        word = _SELECT
    elif first == 0x75:
        word = _UPDATE
    elif first == 0x64:
        word = _DELETE
    else:
        return _transaction(data[start:end]) if n - start <= 16 else False
    if n - start < 8 or p[start + 6] > 0x20:
        return False
    i = 1
    while i < 6:
        if p[start + i] | 0x20 != word[i]:
            return False
        i += 1
    allowed = _ALLOWED
    i = start + 6
    if first == 0x75 and _of_the_server(p, i, n):
        return False
    while i < n:
        c = p[i]
        if not allowed[c]:
            if c == 0x27:  # a string, without backslashes
                i += 1
                while i < n and p[i] != 0x27:
                    if p[i] == 0x5C:
                        return False
                    i += 1
                if i == n:
                    return False
            elif c == 0x2D:
                if i + 1 < n and p[i + 1] == 0x2D:
                    return False
            elif c == 0x24:  # $1: no quote begins with a digit
                i += 1
                if i == n or not 0x30 <= p[i] <= 0x39:
                    return False
                while i < n and 0x30 <= p[i] <= 0x39:
                    i += 1
                if i < n and (p[i] == 0x24 or p[i] == 0x5F or 0x61 <= p[i] | 0x20 <= 0x7A):
                    return False
                continue
            elif c == 0x3B:
                return _blank(p, i + 1, n)
            else:
                return False
        elif first == 0x73 and (c | 0x20) == 0x69 and _into(p, i, n):
            return False  # SELECT ... INTO
        i += 1
    return True


def _transaction(text: bytes) -> bool:
    word = text.rstrip(b" ;\t\r\n").upper()
    return word in (b"BEGIN", b"COMMIT", b"END", b"ROLLBACK")


def _into(p: bytes, i: int, n: int) -> bool:
    return i + 4 <= n and p[i + 1] | 0x20 == 0x6E and p[i + 2] | 0x20 == 0x74 and p[i + 3] | 0x20 == 0x6F


def _of_the_server(p: bytes, i: int, n: int) -> bool:
    """What is updated may be a view of PostgreSQL's own: `pg_settings` sets what it is updated to."""
    while i < n and p[i] <= 0x20:
        i += 1
    if i + 3 >= n:
        return False
    a, b, c = p[i] | 0x20, p[i + 1] | 0x20, p[i + 2]
    return (a == 0x70 and b == 0x67 and c == 0x5F) or (a == 0x6F and b == 0x6E and c | 0x20 == 0x6C)  # pg_, onl


def _blank(p: bytes, i: int, n: int) -> bool:
    """Nothing but space is left."""
    while i < n:
        if p[i] > 0x20:
            return False
        i += 1
    return True
