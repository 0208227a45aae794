"""Rules of who may log in and how, in the form of pg_hba.conf. The first one that matches decides; none: refused.

What PostgreSQL could not mean here is a problem, all of them told at once: memberships of roles (samerole, +role)
are known to the server only, host names would put DNS on the path of every log-in, other files are not read, GSS
is not spoken. It knows no passwords and decides nothing but which rule holds.

Source: PostgreSQL documentation, "The pg_hba.conf File"; PostgreSQL 18, hba.c.
"""

from __future__ import annotations

import difflib
import socket
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import NamedTuple

from cenote.errors import ConfigError
from cenote.proxy.auth.interfaces import own_networks
from cenote.proxy.auth.lines import Field, Malformed, Word, made_of, one, read_text

Address = IPv4Address | IPv6Address

METHODS = ("trust", "reject", "md5", "password", "scram-sha-256", "cert", "peer")
_KINDS = ("local", "host", "hostssl", "hostnossl", "hostnogssenc")
_ADDRESS_WORDS = ("all", "samehost", "samenet")
_WHOLE = -1  # a mask of ones


class Network(NamedTuple):
    """Addresses that are equal where the mask has ones."""

    version: int
    address: int
    mask: int

    def __contains__(self, address: object) -> bool:
        return (
            isinstance(address, IPv4Address | IPv6Address)
            and address.version == self.version
            and (int(address) ^ self.address) & self.mask == 0
        )


@dataclass(frozen=True, slots=True)
class Arrival:
    """A connection that asks for a session.

    local: it came through a Unix socket. address: its host; None: a host without an address that could be read
    physical: a replication connection to no database (`replication=true`)
    """

    user: str
    database: str
    local: bool = False
    address: Address | None = None
    tls: bool = False
    physical: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """One line.

    kind: local, host, hostssl or hostnossl. network: None for local, or a word: all, samehost, samenet
    map: of maps.py, for peer and for names in certificates; "": both names must be equal
    clientcert: "", verify-ca or verify-full. clientname: CN or DN, what of a certificate is the name
    """

    method: str
    kind: str = "host"
    databases: tuple[Word, ...] = ()
    users: tuple[Word, ...] = ()
    network: Network | str | None = "all"
    map: str = ""
    clientcert: str = ""
    clientname: str = "CN"
    file: str = ""
    line: int = 0


class Rules:
    """All rules, in order. networks: tells our own, as (address, mask) per interface, for samehost and samenet."""

    def __init__(
        self, rules: Sequence[Rule], networks: Callable[[], Iterable[tuple[Address, Address]]] = own_networks
    ) -> None:
        self.rules = tuple(rules)
        self._networks = networks

    def match(self, arrival: Arrival) -> Rule | None:
        """The rule that holds for this connection; None: it is refused."""
        for rule in self.rules:
            if self._from(rule, arrival) and _asks_for(rule, arrival) and _is(rule, arrival):
                return rule
        return None

    def _from(self, rule: Rule, arrival: Arrival) -> bool:
        if arrival.local or rule.kind == "local":
            return arrival.local and rule.kind == "local"
        if rule.kind == ("hostnossl" if arrival.tls else "hostssl"):
            return False
        if rule.network == "all":
            return True
        address = arrival.address
        if address is None:
            return False
        if isinstance(rule.network, Network):
            return address in rule.network
        whole = rule.network == "samehost"
        return any(address in Network(ours.version, int(ours), _WHOLE if whole else int(mask))
                   for ours, mask in self._networks())  # fmt: skip


def _asks_for(rule: Rule, arrival: Arrival) -> bool:
    """Whether the rule is about this database."""
    for word in rule.databases:
        if arrival.physical:
            if word.is_keyword("replication"):
                return True
        elif word.is_keyword("all"):
            return True
        elif word.is_keyword("sameuser"):
            if arrival.database == arrival.user:
                return True
        elif not word.is_keyword("replication") and word.matches(arrival.database):
            return True
    return False


def _is(rule: Rule, arrival: Arrival) -> bool:
    """Whether the rule is about this user."""
    return any(word.is_keyword("all") or word.matches(arrival.user) for word in rule.users)


# -- reading --------------------------------------------------------------------------------------------------


def load_rules(path: Path) -> Rules:
    """The rules of a file.

    :raises ConfigError: with every problem, each with file and line.
    """
    return parse_rules(read_text(path), str(path))


def parse_rules(text: str, file: str) -> Rules:
    """The rules of a text; `file` is named in problems.

    :raises ConfigError: with every problem, each with file and line.
    """
    rules = made_of(text, file, lambda number, fields: _Reader(fields).rule(file, number))
    if not rules:
        raise ConfigError([f"{file}: it has no rules, so nobody could log in"])
    return Rules(rules)


class _Reader:
    """Takes one line apart, field by field."""

    def __init__(self, fields: list[Field]) -> None:
        self.fields = iter(fields)

    def rule(self, file: str, line: int) -> Rule:
        kind = self._kind()
        databases = tuple(_named(word, _SAMEROLE) for word in self._next("databases"))
        users = tuple(_named(word, ()) for word in self._next("users"))
        network = None if kind == "local" else self._network()
        method = self._method(kind)
        options = self._options(kind, method)
        if method == "cert":
            options["clientcert"] = "verify-full"
        kind = "host" if kind == "hostnogssenc" else kind  # GSS is never spoken
        return Rule(method, kind, databases, users, network, file=file, line=line, **options)

    def _next(self, what: str) -> Field:
        field = next(self.fields, None)
        if field is None:
            raise Malformed(f"the line ends before its {what}")
        return field

    def _kind(self) -> str:
        kind = one(self._next("kind"), "kind of connection").text
        if kind == "hostgssenc":
            raise Malformed("hostgssenc: GSS is not spoken here, so this line could match nobody; leave it out")
        if kind not in _KINDS:
            raise Malformed(f"{kind!r} is no kind of connection{_near(kind, _KINDS)}")
        return kind

    def _network(self) -> Network | str:
        word = one(self._next("address"), "address")
        if word.text in _ADDRESS_WORDS and not word.quoted:
            return word.text
        text, slash, bits = word.text.partition("/")
        try:
            address = _address(text)
        except ValueError:
            raise Malformed(
                f"{word.text!r} is no address: write 192.0.2.0/24, an address and a mask, all, samehost or samenet"
                " (host names are not looked up: DNS would be on the path of every log-in)"
            ) from None
        if slash:
            if not (bits.isascii() and bits.isdecimal() and int(bits[:4]) <= address.max_prefixlen):
                raise Malformed(f"{word.text!r}: allowed behind the slash is 0 to {address.max_prefixlen}")
            free = address.max_prefixlen - int(bits)
            return Network(address.version, int(address), (1 << address.max_prefixlen) - (1 << free))
        text = one(self._next("mask (or write the address with a slash and a number of bits)"), "mask").text
        try:
            mask = ip_address(text)
        except ValueError:
            raise Malformed(f"{text!r} is no mask of an address") from None
        if mask.version != address.version:
            raise Malformed(f"address {word.text} and mask {text} are of different kinds")
        return Network(address.version, int(address), int(mask))

    def _method(self, kind: str) -> str:
        method = one(self._next("method"), "method").text
        if method not in METHODS:
            hint = "; write peer" if method == "ident" and kind == "local" else _near(method, METHODS)
            raise Malformed(f"{method!r} is no method that is spoken here{hint}")
        if method == "peer" and kind != "local":
            raise Malformed("peer: only a Unix socket tells who is at its other end; use it in local lines")
        if method == "peer" and not hasattr(socket, "SO_PEERCRED"):
            raise Malformed("peer: this system does not tell who is at the other end of a Unix socket")
        if method == "cert" and kind != "hostssl":
            raise Malformed("cert: certificates come with TLS only; use it in hostssl lines")
        return method

    def _options(self, kind: str, method: str) -> dict[str, str]:
        options: dict[str, str] = {}
        for word in (word for field in self.fields for word in field):
            name, equals, value = word.text.partition("=")
            if not equals:
                raise Malformed(f"{word.text!r} is no option of the form name=value")
            if name not in _OPTIONS:
                raise Malformed(f"{name!r} is no option that is known here{_near(name, _OPTIONS)}")
            allowed = _OPTIONS[name]
            if allowed and value not in allowed:
                raise Malformed(f"{word.text}: allowed is {' or '.join(allowed)}")
            if allowed and kind != "hostssl":
                raise Malformed(f"{name}: certificates come with TLS only; use it in hostssl lines")
            options[name] = value
        if method == "cert" and options.get("clientcert") == "verify-ca":
            raise Malformed("clientcert=verify-ca: method cert always means verify-full")
        if "map" in options and method not in ("peer", "cert"):
            raise Malformed("map: it is for the methods peer and cert")
        return options


_SAMEROLE = ("samerole", "samegroup")
_OPTIONS: dict[str, tuple[str, ...]] = {
    "map": (),
    "clientcert": ("verify-ca", "verify-full"),
    "clientname": ("CN", "DN"),
}


def _named(word: Word, unknowable: tuple[str, ...]) -> Word:
    """A word of a list of names, ready to match."""
    if any(map(word.is_keyword, unknowable)) or (word.text.startswith("+") and not word.quoted):
        raise Malformed(f"{word.text}: who is a member of which role is known to the server only; write the names")
    return word.compiled()


def read_address(text: str) -> Address | None:
    """An address as sockets and proxies write it; an IPv4 address in the clothes of IPv6 is an IPv4 address."""
    try:
        return _address(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None


def _address(text: str) -> Address:
    address = ip_address(text.partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _near(word: str, known: Collection[str]) -> str:
    begun = [name for name in known if word and name.startswith(word)]
    found = difflib.get_close_matches(word, list(known), 1) or begun
    return f"; did you mean {found[0]}?" if found else f"; allowed is {', '.join(known)}"
