"""A client proves that it knows its password: SCRAM-SHA-256 (-PLUS over TLS), MD5, or the password itself.

An unknown user goes through the same conversation as a known one and fails at its end with the same words, so
that names cannot be found out. It refuses a password in clear text where somebody could read along.

Source: PostgreSQL 18, auth.c, auth-sasl.c and auth-scram.c.
"""

from __future__ import annotations

import secrets
from typing import Any, NamedTuple

from cenote.proxy.auth import say
from cenote.proxy.auth.keys import KeyCache
from cenote.wire import md5, messages
from cenote.wire.refusal import Refusal
from cenote.wire.scram import ServerExchange, Verifier, mechanisms

_MAX_PASSWORD_BYTES = 65_535
_ANSWER = ord("p")


class Proof(NamedTuple):
    """What came of it where SCRAM, or a password given in clear text, was held against a verifier: together they
    log in at a server that has the same verifier."""

    verifier: Verifier
    client_key: bytes


async def prove(
    peer: Any,
    method: str,
    user: str,
    secret: str | None,
    keys: KeyCache,
    *,
    private: bool,
    binding: bytes | None = None,
    strangers_by_scram: bool = False,
) -> Proof | None:
    """Return when the client has proven that it is `user`.

    :param method: scram-sha-256, md5 (SCRAM where only a verifier is known) or password
    :param secret: what is known of the user; None: there is no such user, or it has none
    :param private: nobody can read along: TLS or a Unix socket
    :param binding: what binds SCRAM to the TLS connection (`TlsFilter.binding`); None: SCRAM-SHA-256-PLUS is not
        offered
    :param strangers_by_scram: with md5, a user who does not exist is asked by SCRAM, as those are who do
    :return: None where there is no verifier.
    :raises Refusal: it has not.
    """
    if method == "password":
        proven, proof = await _by_password(peer, user, secret, keys, private=private)
    elif method == "md5" and not (strangers_by_scram if secret is None else is_verifier(secret)):
        proven, proof = await _by_md5(peer, user, secret), None
    elif method in ("md5", "scram-sha-256"):
        proof = await _by_scram(peer, await _verifier(user, secret, keys), binding)
        proven = proof is not None
    else:
        raise ValueError(f"no such way to log in: {method}")
    if not proven:
        raise wrong_password(user)
    return proof


def wrong_password(user: str) -> Refusal:
    """What every failed proof ends with."""
    return Refusal("28P01", f'password authentication failed for user "{user}"')


async def _by_password(
    peer: Any, user: str, secret: str | None, keys: KeyCache, *, private: bool
) -> tuple[bool, Proof | None]:
    if not private:
        raise Refusal(
            "28000",
            "cenote: a password in clear text is accepted over TLS or a Unix socket only",
            hint="Use sslmode=require.",
        )
    say(peer, messages.AUTHENTICATION_CLEARTEXT)
    given = _text(await _answer(peer, "password"))
    if secret is not None and md5.is_stored(secret):
        return md5.verify(secret, b"", md5.response(md5.stored(user, given), b"")), None
    # Also for a password that is known in clear text: the answer takes equally long for users and strangers.
    verifier = await _verifier(user, secret, keys)
    if not await keys.fits(verifier, given):
        return False, None
    if secret is None or not is_verifier(secret):
        return True, None
    # Now that it is known to be the right one, its keys may be kept.
    found = await keys.keys(given.decode("utf-8", "surrogateescape"), verifier.salt, verifier.iterations)
    return True, Proof(verifier, found.client)


async def _by_md5(peer: Any, user: str, secret: str | None) -> bool:
    salt = secrets.token_bytes(4)
    say(peer, messages.authentication_md5(salt))
    given = _text(await _answer(peer, "password"))
    stored = secret if secret is None or md5.is_stored(secret) else md5.stored(user, secret)
    return md5.verify(stored or "", salt, given)


async def _by_scram(peer: Any, verifier: Verifier, binding: bytes | None) -> Proof | None:
    say(peer, messages.authentication_sasl(mechanisms(binding)))
    mechanism, first = _initial(await _answer(peer, "SASL"))
    exchange = ServerExchange(verifier, mechanism, binding=binding)
    if first is None:
        say(peer, messages.authentication_sasl_continue(b""))
        first = await _answer(peer, "SASL")
    say(peer, messages.authentication_sasl_continue(exchange.first(first)))
    final = exchange.final(await _answer(peer, "SASL"))
    if final is None or exchange.client_key is None:
        return None
    say(peer, messages.authentication_sasl_final(final))
    return Proof(verifier, exchange.client_key)


async def _verifier(user: str, secret: str | None, keys: KeyCache) -> Verifier:
    """What checks this user's password; the mock's where there is nothing that could be checked."""
    if secret is None or md5.is_stored(secret):
        return keys.mock(user)
    if is_verifier(secret):
        return Verifier.parse(secret)
    return await keys.verifier(user, secret)


def is_verifier(secret: str) -> bool:
    """Whether a secret has the form of a SCRAM verifier."""
    return secret.startswith("SCRAM-SHA-256$")


async def _answer(peer: Any, what: str) -> bytes:
    """The body of a PasswordMessage, SASLInitialResponse or SASLResponse."""
    kind, body = await peer.inbox.message(_MAX_PASSWORD_BYTES)
    if kind != _ANSWER:
        raise Refusal("08P01", f"expected {what} response, got message type {kind}")
    return bytes(body)


def _text(body: bytes) -> bytes:
    """The text of a PasswordMessage."""
    if body.find(b"\0") != len(body) - 1 or not body:
        raise Refusal("08P01", "invalid password packet size")
    if body == b"\0":
        raise Refusal("28P01", "empty password returned by client")
    return body[:-1]


def _initial(body: bytes) -> tuple[str, bytes | None]:
    """The mechanism that the client chose, and its first message where it sent one along."""
    name, zero, rest = body.partition(b"\0")
    length = int.from_bytes(rest[:4], "big", signed=True)
    if not zero or len(rest) < 4 or len(rest) - 4 != max(length, 0) or length < -1:
        raise Refusal("08P01", "invalid message format")
    return name.decode("ascii", "replace"), None if length < 0 else rest[4:]
