"""Load balancers before us: whose connections begin with a PROXY protocol header, and what it changes.

Whoever is trusted must send one, as with other receivers: otherwise a client whose balancer sends none could write
its own. From everybody else a header is no header, but bytes that are no startup packet.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from cenote.proxy.inbox import Inbox
from cenote.wire.proxy_header import MAX_HEADER_BYTES, ProxyHeader, parse_header

UNIX = "unix"


class Balancers:
    """Those of one configuration.

    :param words: networks such as 10.0.0.0/8, single addresses, or `unix` for all who come by the Unix socket
    :raises ValueError: one of them is neither
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._unix = UNIX in words
        self._networks = [ipaddress.ip_network(word) for word in words if word != UNIX]

    def include(self, address: str) -> bool:
        """Whether a connection from this `host:port`, or `unix`, begins with a header."""
        if address == UNIX:
            return self._unix
        host = ipaddress.ip_address(address.rpartition(":")[0].partition("%")[0])
        return any(host in network for network in self._networks)


@lru_cache(4)
def balancers(words: tuple[str, ...]) -> Balancers:
    """Those of this option's value, made once."""
    return Balancers(words)


async def introduction(client: Any, words: Sequence[str]) -> str:
    """Read the header of a client whose connection begins with one; it has the address in it from then on.

    :param words: the option `listen.proxy_protocol_from`
    :return: what the header calls the client, or ""
    :raises ProtocolError: there is none, or it is malformed
    :raises ConnectionResetError: the connection ended before
    """
    if not words or not balancers(tuple(words)).include(client.address):
        return ""
    header = await _header(client.inbox)
    if header.source is not None:
        client.address = f"{header.source[0]}:{header.source[1]}"
    return header.label


async def _header(inbox: Inbox) -> ProxyHeader:
    while True:
        came = await inbox.peek(min(max(1, inbox.buffered()), MAX_HEADER_BYTES))
        header = parse_header(came)
        if header is not None:
            await inbox.exactly(header.length)
            return header
        await inbox.peek(len(came) + 1)
