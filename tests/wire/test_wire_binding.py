"""Channel-binding data of certificates, as openssl and the RFC see them."""

import hashlib
import ssl
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.wire.binding import server_end_point

RSA = ("-newkey", "rsa:2048")
EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
PSS = (*RSA, "-sigopt", "rsa_padding_mode:pss")
CASES = {
    "rsa sha256": ((*RSA, "-sha256"), "sha256"),
    "rsa sha384": ((*RSA, "-sha384"), "sha384"),
    "rsa sha1": ((*RSA, "-sha1"), "sha256"),
    "ec sha256": ((*EC, "-sha256"), "sha256"),
    "ec sha512": ((*EC, "-sha512"), "sha512"),
    "pss sha256": ((*PSS, "-sha256"), "sha256"),
    "pss sha512": ((*PSS, "-sha512"), "sha512"),
    "pss sha1": ((*PSS, "-sha1"), "sha256"),
    "ed25519": (("-newkey", "ed25519"), None),
}


def certificate(folder: Path, words: tuple[str, ...]) -> bytes:
    command = ["openssl", "req", "-x509", "-nodes", "-subj", "/CN=x", "-days", "1", "-keyout", "/dev/null", *words]
    done = subprocess.run(command, capture_output=True, check=True, cwd=folder)
    return ssl.PEM_cert_to_DER_cert(done.stdout.decode())


@pytest.mark.parametrize(("words", "name"), CASES.values(), ids=CASES)
def test_the_hash_is_the_one_of_the_signature(tmp_path: Path, words: tuple[str, ...], name: str | None) -> None:
    der = certificate(tmp_path, words)
    assert server_end_point(der) == (hashlib.new(name, der).digest() if name else None)
    assert server_end_point(der[:-1]) is None


@given(
    st.binary(max_size=60) | st.lists(st.sampled_from([b"\x30", b"\x06", b"\x82", b"\x03", b"\x00"])).map(b"".join)
)
def test_what_is_no_certificate_has_none(data: bytes) -> None:
    assert server_end_point(data) is None
