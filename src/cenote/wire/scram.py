"""SCRAM-SHA-256 and SCRAM-SHA-256-PLUS, both sides, as PostgreSQL speaks them.

Sources: RFC 5802, RFC 7677, RFC 5929 (tls-server-end-point), RFC 4013 (SASLprep); PostgreSQL documentation,
"SASL Authentication". PostgreSQL's own: the user's name inside SCRAM is ignored, a password that SASLprep does
not take is used as it is. No other channel binding, no authorization identity, no extensions.

Deriving keys from a password costs milliseconds on purpose: `Keys.of_password` is plain and apart from the
exchanges, to be run in a thread. Nonces are arguments; the defaults are random.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
import stringprep
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from cenote.errors import ProtocolError
from cenote.wire.refusal import Refusal

MECHANISM = "SCRAM-SHA-256"
MECHANISM_PLUS = "SCRAM-SHA-256-PLUS"
ITERATIONS = 4096  # PostgreSQL's default, and what the RFC asks for at least
SALT_BYTES = 16

_KEY_BYTES = 32
_NONCE_BYTES = 18  # raw; base64 makes 24 characters of it
# A server that asks for more wants our time, not a proof: this is some seconds of work.
_MAX_ITERATIONS = 10_000_000
_PLUS_HEADER = b"p=tls-server-end-point,,"
_PRINTABLE = re.compile(rb"[\x21-\x2b\x2d-\x7e]*")
_ATTRIBUTE = re.compile(rb"[A-Za-z]=[^,]*")
_VERIFIER = re.compile(r"SCRAM-SHA-256\$([0-9]{1,10}):([^$:]+)\$([^$:]+):([^$:]+)")


def new_nonce() -> bytes:
    """A random nonce."""
    return base64.b64encode(secrets.token_bytes(_NONCE_BYTES))


class Keys(NamedTuple):
    """What a password becomes for one salt and one number of iterations. `client` can log in: it is a secret."""

    client: bytes
    server: bytes

    @classmethod
    def of_password(cls, password: str | bytes, salt: bytes, iterations: int = ITERATIONS) -> Keys:
        """Derive them. Slow on purpose, about 2 ms for 4096 iterations: run it in a thread."""
        salted = hashlib.pbkdf2_hmac("sha256", prepared(password), salt, iterations)
        return cls(_hmac(salted, b"Client Key"), _hmac(salted, b"Server Key"))


class Verifier(NamedTuple):
    """What a server keeps of a password: enough to check a proof, not enough to make one."""

    iterations: int
    salt: bytes
    stored_key: bytes
    server_key: bytes

    @classmethod
    def parse(cls, text: str) -> Verifier:
        """Read PostgreSQL's form, `SCRAM-SHA-256$iterations:salt$stored key:server key`.

        :raises ValueError: it is not one.
        """
        found = _VERIFIER.fullmatch(text)
        if found is None:
            raise ValueError("not a verifier of the form SCRAM-SHA-256$iterations:salt$stored key:server key")
        iterations = int(found[1])
        salt, stored_key, server_key = (_unbase64(part.encode("utf-8", "replace")) for part in found.groups()[1:])
        if not salt or not stored_key or not server_key or not iterations:
            raise ValueError("a SCRAM verifier whose number of iterations, salt or keys cannot be read")
        if len(stored_key) != _KEY_BYTES or len(server_key) != _KEY_BYTES:
            raise ValueError(f"a SCRAM verifier whose keys do not have {_KEY_BYTES} bytes")
        return cls(iterations, salt, stored_key, server_key)

    @classmethod
    def of_keys(cls, keys: Keys, salt: bytes, iterations: int = ITERATIONS) -> Verifier:
        """The verifier that belongs to keys."""
        return cls(iterations, salt, _hash(keys.client), keys.server)

    @classmethod
    def of_password(cls, password: str | bytes, salt: bytes, iterations: int = ITERATIONS) -> Verifier:
        """The verifier of a password. Slow on purpose: run it in a thread."""
        return cls.of_keys(Keys.of_password(password, salt, iterations), salt, iterations)

    @classmethod
    def mock(cls, user: bytes, secret: bytes, iterations: int = ITERATIONS) -> Verifier:
        """A verifier for a user who does not exist: always the same one, and no password fits.

        secret: random, kept for as long as clients shall not see that the salt of a user changes.
        """
        salt = _hmac(secret, b"salt " + user)[:SALT_BYTES]
        return cls(iterations, salt, _hmac(secret, b"stored " + user), _hmac(secret, b"server " + user))

    def format(self) -> str:
        """PostgreSQL's form."""
        salt, stored, server = (
            base64.b64encode(part).decode() for part in (self.salt, self.stored_key, self.server_key)
        )
        return f"{MECHANISM}${self.iterations}:{salt}${stored}:{server}"

    def fits(self, password: str | bytes) -> bool:
        """Whether a password given in clear text is the one. Slow on purpose: run it in a thread."""
        return hmac.compare_digest(Keys.of_password(password, self.salt, self.iterations).server, self.server_key)


class ServerExchange:
    """The server's side of one exchange.

    mechanism: what the client chose of those offered. binding: the channel-binding data where PLUS was offered
    (always with TLS and a certificate that has some), None where it was not. nonce: the server's part.
    """

    __slots__ = ("_bare", "_binding", "_header", "_mechanism", "_nonce", "_server_first", "client_key", "verifier")

    def __init__(
        self,
        verifier: Verifier,
        mechanism: str = MECHANISM,
        *,
        binding: bytes | None = None,
        nonce: bytes | None = None,
    ) -> None:
        if mechanism not in mechanisms(binding):
            raise Refusal("08P01", "client selected an invalid SASL authentication mechanism")
        self.verifier = verifier
        self._mechanism = mechanism
        self._binding = binding
        self._nonce = new_nonce() if nonce is None else nonce
        self._header = b""
        self._bare = b""
        self._server_first = b""
        #: After `final` has succeeded: what logs in at a server that has the same verifier.
        self.client_key: bytes | None = None

    def first(self, data: bytes) -> bytes:
        """Take client-first-message; return server-first-message.

        :raises Refusal: it is malformed (08P01), asks for what is not supported (0A000), or says that the server
            has no channel binding when it offered one, which is what a man in the middle would say (28000).
        """
        self._header, self._bare = self._split_header(data)
        if self._bare.startswith(b"m"):
            raise Refusal("0A000", "client requires an unsupported SCRAM extension")
        parts = self._bare.split(b",")
        _value(parts, 0, b"n")
        client_nonce = _value(parts, 1, b"r")
        if not _PRINTABLE.fullmatch(client_nonce):
            raise Refusal("08P01", "non-printable characters in SCRAM nonce")
        if not all(map(_ATTRIBUTE.fullmatch, parts[2:])):
            raise _malformed("Attribute expected in client-first-message.")
        self._nonce = client_nonce + self._nonce
        salt = base64.b64encode(self.verifier.salt)
        self._server_first = b"r=%s,s=%s,i=%d" % (self._nonce, salt, self.verifier.iterations)
        return self._server_first

    def final(self, data: bytes) -> bytes | None:
        """Take client-final-message; return server-final-message, or None: the proof is wrong.

        :raises Refusal: it is malformed or has another nonce (08P01), or is bound to another channel (28000).
        """
        without_proof, comma, proof_part = data.rpartition(b",")
        parts = without_proof.split(b",")
        header = self._header + (self._binding or b"" if self._header == _PLUS_HEADER else b"")
        if not hmac.compare_digest(_value(parts, 0, b"c"), base64.b64encode(header)):
            if self._header == _PLUS_HEADER:
                raise Refusal("28000", "SCRAM channel binding check failed")
            raise Refusal("08P01", "unexpected SCRAM channel-binding attribute in client-final-message")
        if not hmac.compare_digest(_value(parts, 1, b"r"), self._nonce):
            raise Refusal("08P01", "invalid SCRAM response", detail="Nonce does not match.")
        if not comma or not all(map(_ATTRIBUTE.fullmatch, parts[2:])):
            raise _malformed("Attribute expected in client-final-message.")
        if any(part.startswith(b"p=") for part in parts[2:]):
            raise _malformed("Garbage found at the end of client-final-message.")
        proof = _unbase64(_value([proof_part], 0, b"p"))
        if proof is None or len(proof) != _KEY_BYTES:
            raise _malformed("Malformed proof in client-final-message.")
        message = b",".join((self._bare, self._server_first, without_proof))
        client_key = _xor(proof, _hmac(self.verifier.stored_key, message))
        if not hmac.compare_digest(_hash(client_key), self.verifier.stored_key):
            return None
        self.client_key = client_key
        return b"v=" + base64.b64encode(_hmac(self.verifier.server_key, message))

    def _split_header(self, data: bytes) -> tuple[bytes, bytes]:
        """The GS2 header of client-first-message, which names the channel binding, and the bare rest."""
        if b"\0" in data:
            raise _malformed("Message length does not match input length.")
        if not data:
            raise _malformed("The message is empty.")
        flag, comma, rest = data.partition(b",")
        plus = self._mechanism == MECHANISM_PLUS
        if flag in (b"n", b"y"):
            if plus:
                raise _malformed(
                    "The client selected SCRAM-SHA-256-PLUS, but the SCRAM message does not include channel"
                    " binding data."
                )
            if flag == b"y" and self._binding is not None:
                raise Refusal(
                    "28000",
                    "SCRAM channel binding negotiation error",
                    detail="The client supports SCRAM channel binding but thinks the server does not.  "
                    "However, this server does support channel binding.",
                )
        elif flag.startswith(b"p="):
            if not plus:
                raise _malformed(
                    "The client selected SCRAM-SHA-256 without channel binding, but the SCRAM message includes"
                    " channel binding data."
                )
            if flag + b",," != _PLUS_HEADER:
                shown = re.sub(rb"[^\x21-\x7e]", b"?", flag[2:32]).decode()
                raise Refusal("08P01", f'unsupported SCRAM channel-binding type "{shown}"')
        else:
            raise _malformed("Unexpected channel-binding flag.")
        if rest[:1] == b"a":
            raise Refusal("0A000", "client uses authorization identity, but it is not supported")
        if not comma or rest[:1] != b",":
            raise _malformed("Unexpected attribute in client-first-message.")
        return flag + b",,", rest[1:]


class ClientExchange:
    """The client's side of one exchange.

    offered: the mechanisms of AuthenticationSASL. binding: the channel-binding data of the server's certificate
    where the connection has TLS, else None. nonce: the client's part.

    :raises ProtocolError: no mechanism that is known here.

        exchange = ClientExchange(offered, binding=...)
        send SASLInitialResponse(exchange.mechanism, exchange.first())
        exchange.challenge(data)
        keys = Keys.of_password(password, exchange.salt, exchange.iterations)      # in a thread
        send SASLResponse(exchange.final(keys))
        exchange.verify(data)
    """

    __slots__ = ("_bare", "_binding", "_header", "_message", "_nonce", "_server_first", "_server_key",
                 "iterations", "mechanism", "salt")  # fmt: skip

    def __init__(
        self, offered: Sequence[str], *, binding: bytes | None = None, nonce: bytes | None = None
    ) -> None:
        if binding is not None and MECHANISM_PLUS in offered:
            self.mechanism = MECHANISM_PLUS
            self._header = _PLUS_HEADER
        elif MECHANISM in offered:
            self.mechanism = MECHANISM
            # "y" lets a server that did offer PLUS know that somebody between took it away.
            self._header = b"n,," if binding is None else b"y,,"
        else:
            raise ProtocolError(
                f"the server asks for SASL mechanisms that are not known here: {', '.join(offered)}"
            )
        self._binding = binding if self._header == _PLUS_HEADER else None
        self._nonce = new_nonce() if nonce is None else nonce
        self._bare = b"n=,r=" + self._nonce
        self._server_first = b""
        self._message = b""
        self._server_key = b""
        self.salt = b""
        self.iterations = 0

    def first(self) -> bytes:
        """client-first-message."""
        return self._header + self._bare

    def challenge(self, data: bytes) -> None:
        """Take server-first-message: `salt` and `iterations` are known from here on.

        :raises ProtocolError: it is malformed, does not continue our nonce, or wants unreasonable work.
        """
        parts = data.split(b",")
        try:
            server_nonce, encoded, count = _value(parts, 0, b"r"), _value(parts, 1, b"s"), _value(parts, 2, b"i")
        except Refusal as refusal:
            raise ProtocolError(f"the server's SCRAM challenge: {refusal.detail}") from None
        if len(server_nonce) <= len(self._nonce) or not server_nonce.startswith(self._nonce):
            raise ProtocolError("the server's SCRAM challenge does not continue our nonce")
        salt = _unbase64(encoded)
        if not salt or not _PRINTABLE.fullmatch(server_nonce):
            raise ProtocolError("the server's SCRAM challenge has a salt or a nonce that cannot be read")
        if not re.fullmatch(rb"[0-9]{1,10}", count) or not 1 <= int(count) <= _MAX_ITERATIONS:
            shown = count[:20].decode("ascii", "replace")
            raise ProtocolError(
                f"the server asks for {shown} iterations of SCRAM; 1 to {_MAX_ITERATIONS} are accepted"
            )
        self._nonce = server_nonce
        self._server_first = data
        self.salt = salt
        self.iterations = int(count)

    def final(self, keys: Keys) -> bytes:
        """client-final-message, for the keys of the password, `salt` and `iterations`."""
        header = base64.b64encode(self._header + (self._binding or b""))
        without_proof = b"c=%s,r=%s" % (header, self._nonce)
        self._message = b",".join((self._bare, self._server_first, without_proof))
        self._server_key = keys.server
        proof = _xor(keys.client, _hmac(_hash(keys.client), self._message))
        return b"%s,p=%s" % (without_proof, base64.b64encode(proof))

    def verify(self, data: bytes) -> None:
        """Take server-final-message.

        :raises ProtocolError: the server says no, or cannot prove that it knows our password.
        """
        if data.startswith(b"e="):
            raise ProtocolError(f"the server ended SCRAM with an error: {data[2:80].decode('utf-8', 'replace')}")
        signature = _unbase64(data[2:].split(b",")[0]) if data.startswith(b"v=") else None
        expected = _hmac(self._server_key, self._message)
        if not self._message or signature is None or not hmac.compare_digest(signature, expected):
            raise ProtocolError("the server's SCRAM signature is wrong: it does not know the password's verifier")


def mechanisms(binding: bytes | None) -> list[str]:
    """What a server offers, best first."""
    return [MECHANISM] if binding is None else [MECHANISM_PLUS, MECHANISM]


def prepared(password: str | bytes) -> bytes:
    """A password as it is hashed: SASLprep where that works, else as it is, like PostgreSQL.

    PostgreSQL looks for what SASLprep prohibits before it normalizes, and so does this.
    """
    raw = password.encode("utf-8", "surrogateescape") if isinstance(password, str) else password
    if raw.isascii():
        return raw
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return raw
    spaced = "".join(" " if stringprep.in_table_c12(char) else char for char in text)
    mapped = "".join(char for char in spaced if not stringprep.in_table_b1(char))
    if not mapped or any(check(char) for char in mapped for check in _PROHIBITED):
        return raw
    if any(map(stringprep.in_table_d1, mapped)):  # right to left: all of it, from the first to the last
        ends = stringprep.in_table_d1(mapped[0]) and stringprep.in_table_d1(mapped[-1])
        if not ends or any(map(stringprep.in_table_d2, mapped)):
            return raw
    return unicodedata.normalize("NFKC", mapped).encode()


_PROHIBITED = (
    stringprep.in_table_c12,
    stringprep.in_table_c21_c22,
    stringprep.in_table_c3,
    stringprep.in_table_c4,
    stringprep.in_table_c5,
    stringprep.in_table_c6,
    stringprep.in_table_c7,
    stringprep.in_table_c8,
    stringprep.in_table_c9,
    stringprep.in_table_a1,
)


def _value(parts: list[bytes], at: int, name: bytes) -> bytes:
    """The value of the attribute that must stand at this place."""
    part = parts[at] if at < len(parts) else b""
    if part[:2] != name + b"=":
        raise _malformed(f'Expected attribute "{name.decode()}" in SCRAM message.')
    return part[2:]


def _malformed(detail: str) -> Refusal:
    return Refusal("08P01", "malformed SCRAM message", detail=detail)


def _hmac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _xor(left: bytes, right: bytes) -> bytes:
    return (int.from_bytes(left, "big") ^ int.from_bytes(right, "big")).to_bytes(len(left), "big")


def _unbase64(text: bytes) -> bytes | None:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error:
        return None
