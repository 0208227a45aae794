"""Channels as they stand in messages and in SQL."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial


def channel_of(frame: bytes) -> bytes:
    """Of a NotificationResponse."""
    return frame[9 : frame.index(b"\0", 9)]


def quoted(channel: bytes) -> bytes:
    """A channel as an identifier."""
    return b'"' + channel.replace(b'"', b'""') + b'"'


def listening(channels: Iterable[bytes], encoding: bytes = b"") -> bytes:
    """The SQL that listens to these.

    :param encoding: what they are written in, where the session it is for has another client encoding
    """
    word = partial(_escaped, encoding) if encoding else quoted
    return b";".join([b"LISTEN " + word(channel) for channel in sorted(channels)])


def _escaped(encoding: bytes, channel: bytes) -> bytes:
    """The identifier in ASCII. Of an encoding that Python does not know by this name, as it is."""
    try:
        text = channel.decode("utf-8" if encoding == b"UTF8" else encoding.decode("ascii"))
    except (LookupError, UnicodeDecodeError):
        return quoted(channel)
    escapes = [
        b"\\+%06X" % ord(letter) if ord(letter) > 126 or letter in '"\\' else letter.encode() for letter in text
    ]
    return b'U&"' + b"".join(escapes) + b'"'
