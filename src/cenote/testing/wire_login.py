"""Log-ins in steps that a test can spoil: both sides of SCRAM-SHA-256, and md5.

It is written a second time on purpose: the code under test must not agree with itself only.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os

from cenote.testing.wire_trace import WireFailure


class Scram:
    """The client's side of SCRAM-SHA-256 (RFC 5802, RFC 7677), in steps that a test can spoil.

    binding: the server certificate's hash, for SCRAM-SHA-256-PLUS. header: the GS2 header; default: "n,,", or
    with a binding "p=tls-server-end-point,,".
    """

    def __init__(self, password: str, *, header: str = "", binding: bytes = b"", nonce: str = "") -> None:
        self.password = password.encode()
        self.binding = binding
        self.header = header or ("p=tls-server-end-point,," if binding else "n,,")
        self.nonce = nonce or base64.b64encode(os.urandom(18)).decode()
        self.signature = b""

    @property
    def bare(self) -> str:
        return f"n=,r={self.nonce}"

    def first(self) -> bytes:
        """client-first-message."""
        return (self.header + self.bare).encode()

    def final(self, server_first: bytes, *, nonce: str = "", proof: bytes = b"") -> bytes:
        """client-final-message; a given nonce or proof stands in for the right one."""
        parts = dict(part.split("=", 1) for part in server_first.decode().split(","))
        if not parts["r"].startswith(self.nonce):
            raise WireFailure(f"the server's nonce {parts['r']!r} does not begin with ours")
        salted = hashlib.pbkdf2_hmac("sha256", self.password, base64.b64decode(parts["s"]), int(parts["i"]))
        channel = base64.b64encode(self.header.encode() + self.binding).decode()
        without_proof = f"c={channel},r={nonce or parts['r']}"
        signed = f"{self.bare},{server_first.decode()},{without_proof}".encode()
        key = _hmac(salted, b"Client Key")
        mask = _hmac(hashlib.sha256(key).digest(), signed)
        right = bytes(a ^ b for a, b in zip(key, mask, strict=True))
        self.signature = _hmac(_hmac(salted, b"Server Key"), signed)
        return f"{without_proof},p={base64.b64encode(proof or right).decode()}".encode()

    def verify(self, server_final: bytes) -> None:
        """Raise unless the server has shown that it knows the password as well."""
        if server_final != b"v=" + base64.b64encode(self.signature):
            raise WireFailure(f"the server's proof is wrong: {server_final!r}")


class ScramServer:
    """The server's side of SCRAM-SHA-256, for one password. Raises `WireFailure` at a wrong proof."""

    def __init__(self, password: str, *, iterations: int = 4096) -> None:
        self.salt = os.urandom(16)
        self.iterations = iterations
        self.salted = hashlib.pbkdf2_hmac("sha256", password.encode(), self.salt, iterations)
        self.bare = ""
        self.header = ""
        self.said = ""

    def first(self, client_first: bytes) -> bytes:
        """server-first-message."""
        flag, name, self.bare = client_first.decode().split(",", 2)
        self.header = f"{flag},{name},"
        nonce = self.bare.split("r=", 1)[1] + base64.b64encode(os.urandom(18)).decode()
        self.said = f"r={nonce},s={base64.b64encode(self.salt).decode()},i={self.iterations}"
        return self.said.encode()

    def final(self, client_final: bytes) -> bytes:
        """server-final-message."""
        without_proof, proof = client_final.decode().rsplit(",p=", 1)
        signed = f"{self.bare},{self.said},{without_proof}".encode()
        stored = hashlib.sha256(_hmac(self.salted, b"Client Key")).digest()
        key = bytes(a ^ b for a, b in zip(_hmac(stored, signed), base64.b64decode(proof), strict=True))
        if hashlib.sha256(key).digest() != stored:
            raise WireFailure("the client's proof is wrong")
        return b"v=" + base64.b64encode(_hmac(_hmac(self.salted, b"Server Key"), signed))


def _hmac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")


def certificate_hash(certificate: bytes) -> bytes:
    """Binding data tls-server-end-point (RFC 5929) of a DER certificate that was signed with SHA-256."""
    return hashlib.sha256(certificate).digest()


def md5_answer(user: str, password: str, salt: bytes) -> bytes:
    """The answer to AuthenticationMD5Password, without the closing zero."""
    inner = hashlib.md5((password + user).encode()).hexdigest().encode()
    return b"md5" + hashlib.md5(inner + salt).hexdigest().encode()
