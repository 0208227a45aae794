"""How long the answer for a host's name may be kept: one small question to the resolver, without a library.

The C library's resolver does not tell the time to live, so a query is sent as RFC 1035 has it, over UDP, to the
name server of /etc/resolv.conf. It waits for one second at most, asks once, and believes nothing but the answer
to its own question.
"""

import secrets
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address

_TIMEOUT_S = 1.0
_PORT = 53
_HEADER = struct.Struct(">HHHHHH")
_QUESTION = struct.Struct(">HH")
_ANSWER = struct.Struct(">HHIH")
_A, _CNAME, _AAAA, _INTERNET = 1, 5, 28, 1
_RECURSION = 0x0100


@dataclass(frozen=True, slots=True)
class NameFacts:
    """What is known of a host's name.

    ttl_s: the shortest time to live on the way from the name to an address; None: `why` says why not
    asked: the name server that was asked
    """

    ttl_s: int | None
    why: str = ""
    asked: str = ""


class BadAnswer(ValueError):
    """The packet is no answer to the question, or breaks the form."""


def time_to_live(name: str, servers: tuple[str, ...], *, port: int = _PORT) -> NameFacts:
    """Ask the first of `servers` for the addresses of `name`. Takes `_TIMEOUT_S` at most for each kind of them."""
    if not servers:
        return NameFacts(None, "/etc/resolv.conf names no name server")
    asked, why = servers[0], ""
    for kind in (_A, _AAAA):
        try:
            ttl = _ask(name, kind, asked, port)
        except TimeoutError:
            return NameFacts(None, f"the name server {asked} did not answer within {_TIMEOUT_S:g} s", asked)
        except BadAnswer as error:
            why = f"the name server {asked}: {error}"
        except (OSError, ValueError) as error:
            return NameFacts(None, f"the name server {asked} cannot be asked: {error}", asked)
        else:
            return NameFacts(ttl, "", asked)
    return NameFacts(None, f"{why} (a name of /etc/hosts has none)", asked)


def _ask(name: str, kind: int, server: str, port: int) -> int:
    family = socket.AF_INET6 if ip_address(server.partition("%")[0]).version == 6 else socket.AF_INET
    number = secrets.randbelow(1 << 16)
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(_TIMEOUT_S)
        sock.connect((server, port))  # the kernel then drops what comes from elsewhere
        sock.send(question(name, kind, number))
        return shortest_ttl(sock.recv(4096), number)


def question(name: str, kind: int, number: int) -> bytes:
    """The packet that asks for the records of `kind` of `name`.

    :raises ValueError: it is no name of a host
    """
    labels = name.rstrip(".").encode("idna").split(b".")
    if not all(0 < len(label) < 64 for label in labels):
        raise ValueError(f"{name!r} is no name of a host")
    encoded = b"".join(bytes((len(label),)) + label for label in labels) + b"\0"
    return _HEADER.pack(number, _RECURSION, 1, 0, 0, 0) + encoded + _QUESTION.pack(kind, _INTERNET)


def shortest_ttl(packet: bytes, number: int) -> int:
    """The shortest time to live of the answer's aliases and addresses, in seconds.

    :raises BadAnswer: it holds no address, or is not the answer to `number`
    """
    try:
        ttls = list(_ttls(packet, number))
    except (struct.error, IndexError):
        raise BadAnswer("its answer is cut off") from None
    if not any(kind in (_A, _AAAA) for kind, _ in ttls):
        raise BadAnswer("it knows no address for this name")
    return min(ttl for _, ttl in ttls)


def _ttls(packet: bytes, number: int) -> Iterator[tuple[int, int]]:
    got, flags, questions, answers, _, _ = _HEADER.unpack_from(packet)
    if got != number or not flags & 0x8000:
        raise BadAnswer("its answer is not to our question")
    if code := flags & 0x000F:
        raise BadAnswer(f"it answers with code {code}{' (no such name)' if code == 3 else ''}")
    at = _HEADER.size
    for _ in range(questions):
        at = _after_name(packet, at) + _QUESTION.size
    for _ in range(answers):
        at = _after_name(packet, at)
        kind, _, ttl, length = _ANSWER.unpack_from(packet, at)
        at += _ANSWER.size + length
        if kind in (_A, _CNAME, _AAAA):
            yield kind, ttl


def _after_name(packet: bytes, at: int) -> int:
    """The place after a name: labels up to an empty one, or up to a pointer, which ends it."""
    for _ in range(len(packet)):
        length = packet[at]
        if length >= 0xC0:
            return at + 2
        at += 1 + length
        if length == 0:
            return at
    raise BadAnswer("a name without an end")
