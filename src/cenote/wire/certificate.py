"""Names in a certificate, as PostgreSQL compares them: the subject's common name, and all of it as a text.

It reads as much of a certificate's DER as leads to its subject. Whether the certificate can be believed was for
the TLS handshake to find out.

Sources: RFC 5280, section 4.1; RFC 4514 (before it RFC 2253), with the escapes of OpenSSL's XN_FLAG_RFC2253, which
PostgreSQL uses.
"""

from __future__ import annotations

from typing import NamedTuple

_SEQUENCE, _SET, _OBJECT_ID, _VERSION = 0x30, 0x31, 0x06, 0xA0
_COMMON_NAME = "2.5.4.3"
_LONG_LENGTH = 0x80
_MAX_LENGTH_BYTES = 4
_SHORT_ASCII = 0x7F

# How the types of strings are encoded: UTF8String, NumericString, PrintableString, T61String, IA5String,
# VisibleString, UniversalString, BMPString.
_ENCODINGS = {
    0x0C: "utf-8",
    0x12: "ascii",
    0x13: "ascii",
    0x14: "latin-1",
    0x16: "ascii",
    0x1A: "ascii",
    0x1C: "utf-32-be",
    0x1E: "utf-16-be",
}
# The names that OpenSSL writes for attributes; the others are written as numbers.
_NAMES = {
    _COMMON_NAME: "CN",
    "2.5.4.4": "SN",
    "2.5.4.5": "serialNumber",
    "2.5.4.6": "C",
    "2.5.4.7": "L",
    "2.5.4.8": "ST",
    "2.5.4.9": "street",
    "2.5.4.10": "O",
    "2.5.4.11": "OU",
    "2.5.4.12": "title",
    "2.5.4.13": "description",
    "2.5.4.15": "businessCategory",
    "2.5.4.17": "postalCode",
    "2.5.4.18": "postOfficeBox",
    "2.5.4.20": "telephoneNumber",
    "2.5.4.41": "name",
    "2.5.4.42": "GN",
    "2.5.4.43": "initials",
    "2.5.4.44": "generationQualifier",
    "2.5.4.46": "dnQualifier",
    "2.5.4.65": "pseudonym",
    "0.9.2342.19200300.100.1.1": "UID",
    "0.9.2342.19200300.100.1.25": "DC",
    "1.2.840.113549.1.9.1": "emailAddress",
    "1.2.840.113549.1.9.2": "unstructuredName",
}


class Attribute(NamedTuple):
    """One attribute of a name. value: its DER; text: what it says, None where it is no text."""

    kind: str
    value: bytes
    text: str | None


def common_name(certificate: bytes) -> str:
    """The subject's first common name; "": it has none, none that is a text, or one with a zero in it."""
    for parts in _subject(certificate):
        for part in parts:
            if part.kind == _COMMON_NAME:
                return part.text if part.text and "\0" not in part.text else ""
    return ""


def distinguished_name(certificate: bytes) -> str:
    """The whole subject, last part first: `CN=app,OU=shop,O=Example`. "": it is empty, or cannot be read."""
    return ",".join("+".join(map(_written, reversed(parts))) for parts in reversed(_subject(certificate)))


def _written(part: Attribute) -> str:
    name = _NAMES.get(part.kind)
    if name is None or part.text is None:
        return f"{name or part.kind}=#{part.value.hex().upper()}"
    return f"{name}={_escaped(part.text)}"


def _escaped(text: str) -> str:
    out = []
    for at, char in enumerate(text):
        if char in ',+"\\<>;' or (char == "#" and at == 0) or (char == " " and at in (0, len(text) - 1)):
            out.append("\\" + char)
        elif " " <= char < chr(_SHORT_ASCII):
            out.append(char)
        else:
            out += [f"\\{byte:02X}" for byte in char.encode("utf-8", "replace")]
    return "".join(out)


def _subject(certificate: bytes) -> list[list[Attribute]]:
    """The subject, part by part; empty for what is not a certificate."""
    try:
        _, whole, _, _ = _element(certificate, _SEQUENCE)
        _, rest, _, _ = _element(whole, _SEQUENCE)
        if rest[:1] == bytes([_VERSION]):
            rest = _element(rest)[2]
        for _ in range(4):  # serial number, algorithm of the signature, issuer, validity
            rest = _element(rest)[2]
        _, names, _, _ = _element(rest, _SEQUENCE)
        subject = []
        while names:
            _, parts, names, _ = _element(names, _SET)
            subject.append(_attributes(parts))
    except ValueError:
        return []
    return subject


def _attributes(parts: bytes) -> list[Attribute]:
    found = []
    while parts:
        _, pair, parts, _ = _element(parts, _SEQUENCE)
        _, kind, rest, _ = _element(pair, _OBJECT_ID)
        tag, value, _, whole = _element(rest)
        try:
            text = value.decode(_ENCODINGS[tag]) if tag in _ENCODINGS else None
        except UnicodeDecodeError:
            text = None
        found.append(Attribute(_dotted(kind), whole, text))
    return found


def _dotted(raw: bytes) -> str:
    """An object identifier in numbers."""
    numbers: list[int] = []
    number = 0
    for byte in raw:
        number = number << 7 | byte & 0x7F
        if not byte & 0x80:
            numbers.append(number)
            number = 0
    if not numbers:
        raise ValueError("an object identifier without a number")
    first = min(numbers[0] // 40, 2)
    return ".".join(map(str, [first, numbers[0] - 40 * first, *numbers[1:]]))


def _element(data: bytes, tag: int | None = None) -> tuple[int, bytes, bytes, bytes]:
    """The first element, which must have this tag: its tag, its content, what follows it, and the whole of it."""
    if len(data) < 2 or (tag is not None and data[0] != tag):
        raise ValueError("not a certificate")
    length, start = data[1], 2
    if length & _LONG_LENGTH:
        count = length & ~_LONG_LENGTH
        if not 1 <= count <= _MAX_LENGTH_BYTES:
            raise ValueError("not a certificate")
        start += count
        length = int.from_bytes(data[2:start], "big")
    end = start + length
    if end > len(data):
        raise ValueError("a certificate that ends too early")
    return data[0], data[start:end], data[end:], data[:end]
