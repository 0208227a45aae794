"""Proving who somebody is: clients to us, and us to servers."""

from typing import Any


def say(peer: Any, data: bytes) -> None:
    """Write a message of a log-in.

    :raises ConnectionResetError: the peer is gone, although what it said before may still be unread.
    """
    if peer.lost:
        raise ConnectionResetError("the peer closed the connection")
    peer.write(data)
