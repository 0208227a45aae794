"""The TLS filter: both ends against each other, against the standard library's sockets and against openssl."""

import contextlib
import gc
import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.errors import ConfigError
from cenote.testing.postgres import TLSFiles, make_tls_files
from cenote.wire.binding import server_end_point
from cenote.wire.tls import ALPN, TlsFilter, client_context, server_context

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
NAMES = [version.name for version in VERSIONS]
BIG = bytes(range(256)) * 4096 + b"the end"  # over a MiB, many records


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> TLSFiles:
    return make_tls_files(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> TLSFiles:
    """Certificates of another authority."""
    return make_tls_files(tmp_path_factory.mktemp("strangers"))


@pytest.fixture(scope="session")
def server(files: TLSFiles) -> ssl.SSLContext:
    return server_context(files.server_certificate, files.server_key)


@pytest.fixture(scope="session")
def client(files: TLSFiles) -> ssl.SSLContext:
    return client_context("verify-full", files.ca)


def of_version(context: ssl.SSLContext, version: ssl.TLSVersion) -> ssl.SSLContext:
    context.minimum_version = context.maximum_version = version
    return context


@pytest.fixture(scope="session", params=VERSIONS, ids=NAMES)
def contexts(request: pytest.FixtureRequest, files: TLSFiles) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of a server and of a client, each version of TLS in turn."""
    return (
        of_version(server_context(files.server_certificate, files.server_key), request.param),
        of_version(client_context("verify-full", files.ca), request.param),
    )


Pair = tuple[TlsFilter, TlsFilter]


def ends(server: ssl.SSLContext, client: ssl.SSLContext, name: str = "localhost") -> Pair:
    return (
        TlsFilter(server, server_side=True),
        TlsFilter(client, server_side=False, server_hostname=name),
    )


def settle(left: TlsFilter, right: TlsFilter, cut: Callable[[bytes], list[bytes]] = lambda data: [data]) -> None:
    """Carry what TLS has to say between two ends until it has said all."""
    quiet = 0
    while quiet < 2:
        quiet += 1
        for one, other in ((left, right), (right, left)):
            for piece in cut(one.pending()):
                if piece:
                    quiet = 0
                    assert other.receive(piece) == b""


def connected(server: ssl.SSLContext, client: ssl.SSLContext) -> Pair:
    pair = ends(server, client)
    settle(*pair)
    assert pair[0].established
    assert pair[1].established
    return pair


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


Contexts = tuple[ssl.SSLContext, ssl.SSLContext]

# -- both ends --------------------------------------------------------------------------------------------


def test_what_one_end_sends_the_other_receives(contexts: Contexts) -> None:
    left, right = connected(*contexts)
    for one, other in ((left, right), (right, left)):
        for data in (b"x", b"hello", bytes(16384), bytes(16385), BIG, b""):
            assert other.receive(one.send(data)) == data


def test_both_ends_know_what_was_agreed(contexts: Contexts) -> None:
    for end in connected(*contexts):
        assert end.alpn == ALPN
        assert end.version == contexts[0].maximum_version.name.replace("_", ".")
        assert end.cipher
        assert "AES" in end.cipher or "CHACHA" in end.cipher


def test_only_the_client_sees_a_certificate(contexts: Contexts, files: TLSFiles) -> None:
    left, right = connected(*contexts)
    assert left.peer_certificate is None
    assert right.peer_certificate == ssl.PEM_cert_to_DER_cert(files.server_certificate.read_text())


def test_nothing_is_known_before_the_handshake(contexts: Contexts) -> None:
    left, right = ends(*contexts)
    assert (left.established, right.established) == (False, False)
    assert right.pending()[:1] == b"\x16"
    assert right.pending() == b""
    assert (left.alpn, left.cipher, left.peer_certificate) == (None, None, None)


def test_it_makes_no_difference_how_bytes_are_cut(contexts: Contexts) -> None:
    left, right = ends(*contexts)
    settle(left, right, bytewise)
    assert left.established
    assert right.established
    stream = right.send(b"hello") + right.send(b", ") + right.send(b"world")
    assert b"".join(map(left.receive, bytewise(stream))) == b"hello, world"


def test_records_that_come_together_leave_together(contexts: Contexts) -> None:
    left, right = connected(*contexts)
    records = [right.send(b"%d " % number) for number in range(20)]
    half = records[19][:10]
    assert left.receive(b"".join(records[:19]) + half) == b"".join(b"%d " % number for number in range(19))
    assert left.receive(records[19][10:]) == b"19 "


def test_data_right_behind_the_handshake_is_not_lost(contexts: Contexts) -> None:
    """A client that is done writes at once: its last flight and its first data come in one read."""
    left, right = ends(*contexts)
    while not right.established:
        left.receive(right.pending())
        right.receive(left.pending())
    assert left.receive(right.pending() + right.send(b"startup")) == b"startup"


@given(data=st.data())
def test_many_connections_do_not_mix(data: st.DataObject, server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Whatever comes in whatever pieces, each connection receives what its own other end sent, in order."""
    pairs = [connected(server, client) for _ in range(3)]
    wires = [b""] * 3
    sent = [b""] * 3
    received = [b""] * 3
    for _ in range(data.draw(st.integers(1, 25))):
        at = data.draw(st.integers(0, 2))
        if data.draw(st.booleans()):
            text = data.draw(st.binary(max_size=50)) * data.draw(st.sampled_from([1, 1, 2000]))
            sent[at] += text
            wires[at] += pairs[at][1].send(text)
        else:
            count = data.draw(st.integers(0, len(wires[at])))
            received[at] += pairs[at][0].receive(wires[at][:count])
            wires[at] = wires[at][count:]
    for at in range(3):
        assert received[at] + pairs[at][0].receive(wires[at]) == sent[at]


def test_threads_do_not_mix(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    failures: list[BaseException] = []

    def talk(mark: bytes) -> None:
        try:
            left, right = connected(server, client)
            for number in range(300):
                text = mark * (number + 1)
                assert left.receive(right.send(text)) == text
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=talk, args=(mark,)) for mark in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# -- the end ----------------------------------------------------------------------------------------------


def test_a_close_is_seen_by_the_other_end(contexts: Contexts) -> None:
    left, right = connected(*contexts)
    last = right.send(b"bye") + right.close()
    assert left.receive(last) == b"bye"
    assert left.closed
    assert right.receive(left.close()) == b""
    assert right.closed
    with pytest.raises(ssl.SSLError):
        right.send(b"more")


def test_nothing_is_received_behind_the_end(contexts: Contexts) -> None:
    left, right = connected(*contexts)
    behind = connected(*contexts)[1].send(b"of another connection")
    assert left.receive(right.close() + behind) == b""
    assert left.receive(behind) == b""
    assert left.pending() == b""
    left, right = connected(*contexts)  # and none of it was left for the next connection
    assert left.receive(right.send(b"mine")) == b"mine"


def test_a_close_before_the_handshake_says_nothing_more(contexts: Contexts) -> None:
    left, right = ends(*contexts)
    assert left.close() == b""
    assert right.close()[:1] == b"\x16"


def test_a_record_that_was_changed_ends_the_connection_with_an_alert(contexts: Contexts) -> None:
    left, right = connected(*contexts)
    settle(left, right)
    record = bytearray(right.send(b"SELECT 1"))
    record[-1] ^= 1
    with pytest.raises(ssl.SSLError):
        left.receive(bytes(record))
    assert left.closed
    with pytest.raises(ssl.SSLError):
        right.receive(left.pending())
    assert left.receive(b"more") == b""


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"\x00\x00\x00\x08\x04\xd2\x16\x2f"]
)
def test_what_is_no_handshake_is_an_error(server: ssl.SSLContext, data: bytes) -> None:
    end = TlsFilter(server, server_side=True)
    with pytest.raises(ssl.SSLError):
        end.receive(data)
    assert end.closed
    assert not end.established


def test_an_error_of_one_connection_leaves_the_others_alone(
    server: ssl.SSLContext, client: ssl.SSLContext
) -> None:
    left, right = connected(server, client)
    start = right.send(b"whole")
    assert left.receive(start[:7]) == b""
    broken = TlsFilter(server, server_side=True)
    with pytest.raises(ssl.SSLError):
        broken.receive(b"\x16\x03\x01\x40\x00" + b"x" * 20_000)
    assert left.receive(start[7:]) == b"whole"


@given(data=st.binary(max_size=400), after=st.booleans())
def test_no_bytes_do_worse_than_end_the_connection(
    data: bytes, after: bool, server: ssl.SSLContext, client: ssl.SSLContext
) -> None:
    end = connected(server, client)[0] if after else TlsFilter(server, server_side=True)
    try:
        assert end.receive(data) == b""
    except ssl.SSLError:
        assert end.closed
    end.pending()
    end.close()


# -- other implementations --------------------------------------------------------------------------------


def pump(end: TlsFilter, sock: socket.socket, wanted: Callable[[bytes], bool]) -> bytes:
    """Run a filter over a socket until its plaintext is what the caller waits for, or the other end is gone."""
    plain = b""
    sock.sendall(end.pending())
    while not wanted(plain) and not end.closed:
        data = sock.recv(65_536)
        if not data:
            break
        plain += end.receive(data)
        sock.sendall(end.pending())
    return plain


@contextmanager
def other_end(talk: Callable[[socket.socket], None]) -> Iterator[socket.socket]:
    """A socket whose other end is in the hands of `talk`, in a thread."""
    ours, theirs = socket.socketpair()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            with theirs:
                talk(theirs)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        with ours:
            ours.settimeout(20)
            yield ours
    finally:
        thread.join()
    assert failures == []


def echo(sock: ssl.SSLSocket) -> None:
    with sock:
        while data := sock.recv(65_536):
            sock.sendall(data)


def test_a_socket_of_the_standard_library_is_understood_as_a_client(contexts: Contexts) -> None:
    def talk(sock: socket.socket) -> None:
        echo(contexts[1].wrap_socket(sock, server_hostname="localhost"))

    with other_end(talk) as sock:
        end = TlsFilter(contexts[0], server_side=True)
        pump(end, sock, lambda _: end.established)
        for text in (b"hello", b"x" * 40_000):
            sock.sendall(end.send(text))
            assert pump(end, sock, lambda plain, text=text: len(plain) >= len(text)) == text  # type: ignore[misc]
        sock.sendall(end.close())


def test_a_socket_of_the_standard_library_is_understood_as_a_server(contexts: Contexts) -> None:
    def talk(sock: socket.socket) -> None:
        echo(contexts[0].wrap_socket(sock, server_side=True))

    with other_end(talk) as sock:
        end = TlsFilter(contexts[1], server_side=False, server_hostname="localhost")
        pump(end, sock, lambda _: end.established)
        for text in (b"hello", b"x" * 40_000):
            sock.sendall(end.send(text))
            assert pump(end, sock, lambda plain, text=text: len(plain) >= len(text)) == text  # type: ignore[misc]
        sock.sendall(end.close())


def test_openssl_changes_its_keys_in_the_middle(server: ssl.SSLContext) -> None:
    """A KeyUpdate that asks for one in return: nothing to read, and another key for what is sent next."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        command = ["openssl", "s_client", "-connect", where, "-tls1_3", "-alpn", ALPN, "-servername", "localhost"]
        openssl = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert openssl.stdin
        try:
            listener.settimeout(20)
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(20)
                end = TlsFilter(server, server_side=True)
                pump(end, sock, lambda _: end.established)
                assert (end.alpn, end.version) == (ALPN, "TLSv1.3")
                openssl.stdin.write(b"before\n")
                openssl.stdin.flush()
                assert pump(end, sock, lambda plain: plain.endswith(b"\n")) == b"before\n"
                openssl.stdin.write(b"K\n")
                openssl.stdin.flush()
                update = sock.recv(65_536)
                assert end.receive(update) == b""
                assert update
                openssl.stdin.write(b"after\n")
                openssl.stdin.flush()
                assert pump(end, sock, lambda plain: plain.endswith(b"\n")) == b"after\n"
                sock.sendall(end.send(b"and back\n") + end.close())
            said, _ = openssl.communicate(timeout=20)
            assert b"and back" in said
        finally:
            openssl.kill()
            openssl.wait()
            for pipe in (openssl.stdin, openssl.stdout):
                assert pipe
                pipe.close()


def test_a_client_may_not_renegotiate(server: ssl.SSLContext) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        command = ["openssl", "s_client", "-connect", where, "-tls1_2"]
        openssl = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert openssl.stdin
        try:
            listener.settimeout(20)
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(20)
                end = TlsFilter(server, server_side=True)
                pump(end, sock, lambda _: end.established)
                openssl.stdin.write(b"R\n")
                openssl.stdin.flush()
                with pytest.raises(ssl.SSLError):
                    pump(end, sock, bool)
            said, _ = openssl.communicate(timeout=20)
            assert b"no renegotiation" in said
        finally:
            openssl.kill()
            openssl.wait()
            for pipe in (openssl.stdin, openssl.stdout):
                assert pipe
                pipe.close()


def bare_client(
    server: ssl.SSLContext, client: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> ssl.SSLObject:
    """The standard library's client, connected to a filter and told its session tickets."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    bare = client.wrap_bio(incoming, outgoing, server_hostname="localhost", session=session)
    end = TlsFilter(server, server_side=True)
    for _ in range(4):
        with contextlib.suppress(ssl.SSLWantReadError):
            bare.do_handshake()
        end.receive(outgoing.read())
        incoming.write(end.pending())
    assert end.established
    incoming.write(end.send(b"x"))
    assert bare.read() == b"x"
    return bare


def test_a_client_may_take_its_session_up_again(contexts: Contexts) -> None:
    first = bare_client(*contexts)
    assert not first.session_reused
    assert bare_client(*contexts, first.session).session_reused


# -- memory -----------------------------------------------------------------------------------------------


def used_kib() -> int:
    gc.collect()
    found = re.search(r"^Pss: +(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def test_a_thousand_idle_clients_stay_small_also_after_large_data(
    server: ssl.SSLContext, client: ssl.SSLContext
) -> None:
    connected(server, client)
    before = used_kib()
    idle = []
    for _ in range(1000):
        left, right = connected(server, client)
        left.receive(right.send(b"x" * 30_000))
        left.send(b"x" * 30_000)
        idle.append(left)
    each = (used_kib() - before) / len(idle)
    assert each < 25, f"{each:.1f} KiB each"


# -- contexts ---------------------------------------------------------------------------------------------


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str = "localhost") -> None:
    settle(*ends(server, client, name))


@pytest.mark.parametrize("sslmode", ["allow", "prefer", "require"])
def test_without_a_root_certificate_whoever_answers_is_believed(
    server: ssl.SSLContext, sslmode: str, tmp_path: Path
) -> None:
    handshake(server, client_context(sslmode, home=tmp_path), "elsewhere.example")


@pytest.mark.parametrize("sslmode", ["allow", "prefer", "require", "verify-ca", "verify-full"])
def test_with_a_root_certificate_the_chain_is_checked(
    server: ssl.SSLContext, files: TLSFiles, strangers: TLSFiles, sslmode: str
) -> None:
    handshake(server, client_context(sslmode, files.ca))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, client_context(sslmode, strangers.ca))


@pytest.mark.parametrize("sslmode", ["require", "verify-ca"])
def test_the_root_certificate_in_the_home_directory_is_found(
    server: ssl.SSLContext, strangers: TLSFiles, sslmode: str, tmp_path: Path
) -> None:
    (tmp_path / ".postgresql").mkdir()
    (tmp_path / ".postgresql" / "root.crt").write_bytes(strangers.ca.read_bytes())
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, client_context(sslmode, home=tmp_path))


def test_only_verify_full_checks_the_name(server: ssl.SSLContext, files: TLSFiles) -> None:
    handshake(server, client_context("verify-ca", files.ca), "elsewhere.example")
    for name in ("localhost", "127.0.0.1"):
        handshake(server, client_context("verify-full", files.ca), name)
    for name in ("elsewhere.example", "127.0.0.2"):
        with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
            handshake(server, client_context("verify-full", files.ca), name)


def test_the_systems_roots_are_for_verify_full_only(server: ssl.SSLContext) -> None:
    with pytest.raises(ConfigError, match="sslrootcert=system needs sslmode=verify-full"):
        client_context("require", "system")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, client_context("verify-full", "system"))


def test_a_client_shows_its_own_certificate(files: TLSFiles) -> None:
    asking = server_context(files.server_certificate, files.server_key)
    asking.load_verify_locations(files.ca)
    asking.verify_mode = ssl.CERT_REQUIRED
    own = client_context("verify-full", files.ca, files.client_certificate, files.client_key)
    left, right = ends(asking, own)
    settle(left, right)
    assert left.peer_certificate == ssl.PEM_cert_to_DER_cert(files.client_certificate.read_text())
    with pytest.raises(ssl.SSLError):
        handshake(asking, client_context("verify-full", files.ca))


def test_the_clients_certificate_in_the_home_directory_is_found(files: TLSFiles, tmp_path: Path) -> None:
    asking = server_context(files.server_certificate, files.server_key)
    asking.load_verify_locations(files.ca)
    asking.verify_mode = ssl.CERT_REQUIRED
    folder = tmp_path / ".postgresql"
    folder.mkdir()
    (folder / "postgresql.crt").write_bytes(files.client_certificate.read_bytes())
    with pytest.raises(ConfigError, match=r'private key file ".*postgresql.key" does not exist'):
        client_context("require", home=tmp_path)
    (folder / "postgresql.key").write_bytes(files.client_key.read_bytes())
    handshake(asking, client_context("require", home=tmp_path))


def test_tls_before_1_2_is_not_spoken(files: TLSFiles, server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    assert server.minimum_version == client.minimum_version == ssl.TLSVersion.TLSv1_2


def test_alpn_is_no_condition_of_the_handshake(server: ssl.SSLContext, files: TLSFiles) -> None:
    """Clients before libpq 17 offer none; whether it is needed is for the hello to say."""
    old = ssl.create_default_context(cafile=str(files.ca))
    left, right = ends(server, old)
    settle(left, right)
    assert left.established
    assert left.alpn is None


def test_what_cannot_be_used_is_said_clearly(files: TLSFiles, strangers: TLSFiles, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.pem"
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("garbage")
    locked = tmp_path / "locked.key"
    command = [
        "openssl",
        "pkey",
        "-in",
        str(files.server_key),
        "-aes256",
        "-passout",
        "pass:secret",
        "-out",
        str(locked),
    ]
    subprocess.run(command, check=True, capture_output=True)
    certificate, key = files.server_certificate, files.server_key
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: server_context(nothing, key), f'certificate file "{nothing}" does not exist'),
        (lambda: server_context(certificate, tmp_path), "is not a file"),
        (lambda: server_context(certificate, strangers.server_key), "key values mismatch"),
        (lambda: server_context(garbage, key), "cannot be used"),
        (lambda: server_context(certificate, locked), "is encrypted"),
        (lambda: client_context("require", nothing), f'root certificate file "{nothing}" does not exist'),
        (lambda: client_context("verify-ca", home=tmp_path), "root.crt"),
        (lambda: client_context("require", garbage), "cannot be used"),
        (lambda: client_context("disable"), "sslmode=disable"),
        (lambda: client_context("require", files.ca, cert=nothing, key=key), f'certificate file "{nothing}"'),
    ]
    for make, text in cases:
        with pytest.raises(ConfigError, match=re.escape(text)):
            make()


def test_all_missing_files_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        server_context(tmp_path / "a", tmp_path / "b")
    assert len(caught.value.problems) == 2


def test_a_server_knows_what_the_client_calls_it(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    left, right = connected(server, client)
    assert left.server_name == "localhost"
    assert right.server_name == ""


def test_a_server_that_is_called_nothing_knows_no_name(server: ssl.SSLContext, files: TLSFiles) -> None:
    nameless = client_context("verify-ca", files.ca)
    left = TlsFilter(server, server_side=True)
    settle(left, TlsFilter(nameless, server_side=False))
    assert left.established
    assert left.server_name == ""


def test_a_server_has_what_binds_a_log_in_to_its_certificate(
    server: ssl.SSLContext, client: ssl.SSLContext, files: TLSFiles, tmp_path: Path
) -> None:
    der = ssl.PEM_cert_to_DER_cert(files.server_certificate.read_text())
    left, right = connected(server, client)
    assert left.binding == server_end_point(der)
    assert right.binding is None
    both = tmp_path / "both.pem"
    both.write_bytes(files.server_key.read_bytes() + files.server_certificate.read_bytes() + files.ca.read_bytes())
    assert server_context(both, both).binding == server_end_point(der), "its own certificate, not its authority's"


def test_with_an_authority_a_certificate_may_be_shown_and_must_be_right(
    files: TLSFiles, strangers: TLSFiles
) -> None:
    asking = server_context(files.server_certificate, files.server_key, files.ca)
    none = ends(asking, client_context("verify-full", files.ca))
    settle(*none)
    assert none[0].established
    assert none[0].peer_certificate is None
    own = ends(asking, client_context("verify-full", files.ca, files.client_certificate, files.client_key))
    settle(*own)
    assert own[0].peer_certificate == ssl.PEM_cert_to_DER_cert(files.client_certificate.read_text())
    with pytest.raises(ssl.SSLError):
        handshake(
            asking, client_context("verify-full", files.ca, strangers.client_certificate, strangers.client_key)
        )


def test_an_authority_that_cannot_be_read_is_told_with_the_rest(files: TLSFiles, tmp_path: Path) -> None:
    (tmp_path / "garbage.pem").write_text("garbage")
    with pytest.raises(ConfigError) as caught:
        server_context(tmp_path / "a", files.server_key, tmp_path / "garbage.pem")
    assert [problem.split('"')[0] for problem in caught.value.problems] == [
        "certificate file ",
        "certificate authorities file ",
    ]
