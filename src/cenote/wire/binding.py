"""Channel-binding data of a certificate, tls-server-end-point, for SCRAM-SHA-256-PLUS.

Source: RFC 5929, section 4.1: the hash of the certificate, by the hash function of its signature, SHA-256 in
place of MD5 and SHA-1. It reads as much of a certificate's DER as names that function, and nothing else.
"""

from __future__ import annotations

import hashlib

_SEQUENCE = 0x30
_OBJECT_ID = 0x06
_HASH_PARAMETER = 0xA0  # [0] of RSASSA-PSS-params (RFC 4055)

# Signature algorithms that say their hash, and hashes, by object identifier (DER, hexadecimal).
_HASHES = {
    "2a864886f70d010104": "sha256",  # md5WithRSAEncryption
    "2a864886f70d010105": "sha256",  # sha1WithRSAEncryption
    "2a864886f70d01010e": "sha224",  # sha224WithRSAEncryption
    "2a864886f70d01010b": "sha256",  # sha256WithRSAEncryption
    "2a864886f70d01010c": "sha384",  # sha384WithRSAEncryption
    "2a864886f70d01010d": "sha512",  # sha512WithRSAEncryption
    "2a8648ce3d0401": "sha256",  # ecdsa-with-SHA1
    "2a8648ce3d040301": "sha224",  # ecdsa-with-SHA224
    "2a8648ce3d040302": "sha256",  # ecdsa-with-SHA256
    "2a8648ce3d040303": "sha384",  # ecdsa-with-SHA384
    "2a8648ce3d040304": "sha512",  # ecdsa-with-SHA512
    "2b0e03021a": "sha256",  # SHA-1, as a parameter of RSASSA-PSS
    "608648016503040201": "sha256",
    "608648016503040202": "sha384",
    "608648016503040203": "sha512",
    "608648016503040204": "sha224",
}
_RSASSA_PSS = "2a864886f70d01010a"


def server_end_point(certificate: bytes) -> bytes | None:
    """The channel-binding data of a server's certificate (DER), or None: it has none, offer no PLUS.

    None for what is not a certificate and for signatures without a hash function of their own (Ed25519), for
    which the RFC leaves the binding undefined.
    """
    try:
        name = _hash_name(certificate)
    except ValueError:
        return None
    return hashlib.new(name, certificate).digest() if name else None


def _hash_name(certificate: bytes) -> str | None:
    whole, _ = _element(certificate, _SEQUENCE)
    _, rest = _element(whole, _SEQUENCE)  # what is signed
    algorithm, _ = _element(rest, _SEQUENCE)
    oid, parameters = _element(algorithm, _OBJECT_ID)
    if oid.hex() != _RSASSA_PSS:
        return _HASHES.get(oid.hex())
    pss, _ = _element(parameters, _SEQUENCE)
    if pss[:1] != bytes([_HASH_PARAMETER]):
        return "sha256"  # the default is SHA-1
    tagged, _ = _element(pss, _HASH_PARAMETER)
    inner, _ = _element(tagged, _SEQUENCE)
    oid, _ = _element(inner, _OBJECT_ID)
    return _HASHES.get(oid.hex())


def _element(data: bytes, tag: int) -> tuple[bytes, bytes]:
    """The content of the first element, which must have this tag, and what follows the element."""
    if len(data) < 2 or data[0] != tag:
        raise ValueError("not a certificate")
    length, start = data[1], 2
    if length & 0x80:
        start = 2 + (length & 0x7F)
        length = int.from_bytes(data[2:start], "big")
    if start + length > len(data):
        raise ValueError("a certificate that ends too early")
    return data[start : start + length], data[start + length :]
