"""Names in certificates, as openssl writes them, which is what PostgreSQL compares."""

import ssl
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.wire.certificate import common_name, distinguished_name

SUBJECTS = [
    "/CN=app",
    "/C=CH/ST=Zurich/L=Zurich/O=Example, Inc./OU=shop/CN=app",
    "/DC=com/DC=example/UID=ann+CN=Ann Lee",
    r"/O= leading and trailing /OU=#hash/CN=a\\b\"c<d>e;f\+g",
    "/CN=caf\u00e9 \u4f60",
    "/emailAddress=ann@example.com/serialNumber=7/title=Dr/GN=Ann/SN=Lee/CN=ann",
    "/CN=first/CN=second",
    "/O=nobody",
    "/businessCategory=x/1.2.3.4.5=unknown/CN=app",
]


def certificate(subject: str) -> bytes:
    command = ["openssl", "req", "-x509", "-nodes", "-utf8", "-newkey", "ec", "-pkeyopt",
               "ec_paramgen_curve:prime256v1", "-keyout", "/dev/null", "-days", "1", "-subj", subject]  # fmt: skip
    return subprocess.run(command, capture_output=True, check=True).stdout


def written(pem: bytes) -> str:
    command = ["openssl", "x509", "-noout", "-subject", "-nameopt", "RFC2253"]
    said = subprocess.run(command, input=pem, capture_output=True, check=True).stdout.decode()
    return said.removeprefix("subject=").rstrip("\n")


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_distinguished_name_is_what_openssl_writes(subject: str) -> None:
    pem = certificate(subject)
    assert distinguished_name(ssl.PEM_cert_to_DER_cert(pem.decode())) == written(pem)


@pytest.mark.parametrize(
    ("subject", "name"),
    [("/CN=app", "app"), ("/CN=first/CN=second", "first"), ("/O=x", ""), ("/CN=\u4f60", "\u4f60")],
)
def test_the_common_name_is_the_first(subject: str, name: str) -> None:
    assert common_name(ssl.PEM_cert_to_DER_cert(certificate(subject).decode())) == name


def test_a_name_with_a_zero_in_it_is_none() -> None:
    """Others stop reading there, and would take it for another name."""
    der = ssl.PEM_cert_to_DER_cert(certificate("/CN=app.evil").decode())
    assert common_name(der.replace(b"app.evil", b"app\0evil")) == ""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return ssl.PEM_cert_to_DER_cert(certificate("/C=CH/CN=app").decode())


def test_half_a_certificate_has_no_names(whole: bytes) -> None:
    for end in range(len(whole)):
        assert common_name(whole[:end]) == distinguished_name(whole[:end]) == ""


@given(at=st.integers(0, 400), byte=st.integers(0, 255))
def test_whatever_is_changed_it_is_read_without_harm(whole: bytes, at: int, byte: int) -> None:
    spoiled = whole[:at] + bytes([byte]) + whole[at + 1 :]
    assert isinstance(common_name(spoiled), str)
    assert isinstance(distinguished_name(spoiled), str)


@given(st.binary(max_size=80))
def test_what_is_no_certificate_has_no_names(data: bytes) -> None:
    assert common_name(data) == distinguished_name(data) == ""
