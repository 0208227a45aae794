"""A rule is applied to a client: certificate, Unix account or password, in PostgreSQL's order and words.

Nothing here tells users that exist from those that do not before the client has proven who it is: the same
conversation, the same words. Which rule holds is for `rules.py`; what is known of a user comes from `find`.

Source: PostgreSQL 18, auth.c (ClientAuthentication, CheckCertAuth, auth_peer) and miscinit.c.
"""

from __future__ import annotations

import asyncio
import pwd
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from cenote.proxy.auth.keys import KeyCache
from cenote.proxy.auth.maps import Maps
from cenote.proxy.auth.prove import Proof, prove, wrong_password
from cenote.proxy.auth.rules import Arrival, Rule
from cenote.wire.certificate import common_name, distinguished_name
from cenote.wire.refusal import Refusal

_CREDENTIALS = struct.Struct("3i")  # struct ucred of Linux: process, user, group
_FAILED = {"peer": "Peer", "cert": "certificate", "trust": '"trust"'}


class Secret(Protocol):
    """What is known of a user.

    text: plain, md5... or a verifier; None: it has none. allowed: it may log in; reason: why not: "expired"
    (VALID UNTIL has passed, which is for passwords only) or anything else (NOLOGIN)
    """

    @property
    def text(self) -> str | None: ...
    @property
    def allowed(self) -> bool: ...
    @property
    def reason(self) -> Any: ...


EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Known:
    """A user of the configuration."""

    text: str | None
    allowed: bool = True
    reason: str = ""


async def admit(
    peer: Any,
    arrival: Arrival,
    rule: Rule,
    maps: Maps,
    find: Callable[[], Awaitable[Secret | None]],
    keys: KeyCache,
    *,
    strangers_by_scram: bool = False,
) -> Proof | None:
    """Return when the client has shown what the rule asks of it.

    :param find: what is known of the user; asked only when it matters
    :param strangers_by_scram: see `prove`
    :return: what a password was checked with; None: with no verifier
    :raises Refusal: it may not log in, and why.
    """
    user, method = arrival.user, rule.method
    certificate = peer.tls.peer_certificate if peer.tls is not None else None
    if rule.clientcert and certificate is None:
        raise Refusal("28000", "connection requires a valid client certificate")
    if method == "reject":
        raise Refusal("28000", f"pg_hba.conf rejects {_what(arrival)}")
    proof = None
    if method == "peer":
        account = await _account(peer.transport.get_extra_info("socket"))
        if not account or not maps.allows(rule.map, account, user):
            raise _failed(method, user)
        secret = await find()
    elif method in ("trust", "cert"):
        _check_name(rule, maps, certificate, user)
        secret = await find()
    else:
        secret = await find()
        usable = secret is not None and (secret.allowed or secret.reason != EXPIRED)
        proof = await prove(
            peer,
            method,
            user,
            secret.text if secret is not None and usable else None,
            keys,
            private=arrival.local or arrival.tls,
            binding=peer.tls.binding if peer.tls is not None else None,
            strangers_by_scram=strangers_by_scram,
        )
        _check_name(rule, maps, certificate, user)
    if secret is None:
        raise Refusal("28000", f'role "{user}" does not exist')
    if not secret.allowed and secret.reason != EXPIRED:
        raise Refusal("28000", f'role "{user}" is not permitted to log in')
    return proof


def no_rule(arrival: Arrival) -> Refusal:
    """No rule matches."""
    if arrival.physical:
        return Refusal("28000", f"no pg_hba.conf entry for replication connection from {_who(arrival)}")
    return Refusal("28000", f"no pg_hba.conf entry for {_who(arrival)}")


def _what(arrival: Arrival) -> str:
    return f"{'replication ' if arrival.physical else ''}connection for {_who(arrival)}"


def _who(arrival: Arrival) -> str:
    host = "[local]" if arrival.local else str(arrival.address or "???")
    database = "" if arrival.physical else f', database "{arrival.database}"'
    encryption = "SSL encryption" if arrival.tls else "no encryption"
    return f'host "{host}", user "{arrival.user}"{database}, {encryption}'


def _check_name(rule: Rule, maps: Maps, certificate: bytes | None, user: str) -> None:
    """Where the rule asks for it, the certificate must be the user's own."""
    if rule.clientcert != "verify-full" or certificate is None:
        return
    name = distinguished_name(certificate) if rule.clientname == "DN" else common_name(certificate)
    if not name or not maps.allows(rule.map, name, user):
        raise _failed(rule.method, user)


def _failed(method: str, user: str) -> Refusal:
    """Each method has its own words."""
    if method in ("md5", "password", "scram-sha-256"):
        return wrong_password(user)
    return Refusal("28000", f'{_FAILED[method]} authentication failed for user "{user}"')


async def _account(sock: Any) -> str | None:
    """The account at the other end of a Unix socket."""
    _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    try:
        # Accounts may come from the network.
        entry = await asyncio.get_running_loop().run_in_executor(None, pwd.getpwuid, uid)
    except KeyError:
        return None
    return entry.pw_name
