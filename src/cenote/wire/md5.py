"""MD5 passwords: PostgreSQL's own exchange, broken as a hash and kept for old servers and clients.

Source: PostgreSQL documentation, "Message Flow", AuthenticationMD5Password.
"""

from __future__ import annotations

import hashlib
import hmac
import re

_STORED = re.compile(r"md5[0-9a-f]{32}")


def is_stored(secret: str) -> bool:
    """Whether a secret is the stored form of a password, `md5` and 32 hexadecimal digits."""
    return _STORED.fullmatch(secret) is not None


def stored(user: str | bytes, password: str | bytes) -> str:
    """The stored form of a password. It is as good as the password to whoever reads it."""
    return "md5" + hashlib.md5(_raw(password) + _raw(user)).hexdigest()


def response(secret: str, salt: bytes) -> bytes:
    """What a client answers to a salt. `secret`: the stored form."""
    return b"md5" + hashlib.md5(secret[3:].encode() + salt).hexdigest().encode()


def verify(secret: str, salt: bytes, answer: bytes) -> bool:
    """Whether a client's answer (without its closing zero) proves that it knows the password. In constant time.

    secret: the stored form; anything else proves nothing.
    """
    expected = response(secret, salt)
    return hmac.compare_digest(expected, answer) and is_stored(secret)


def _raw(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text
