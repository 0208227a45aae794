"""TLS as a filter between bytes and bytes, and the contexts for both ends.

`TlsFilter` stands between a transport and a protocol: ciphertext in, plaintext out, and the other way. It opens
no sockets and checks no ALPN; it is on the path of every byte of a TLS connection and compiles to C beside its
`.pxd`.

Memory: all filters of a thread share one pair of BIOs. OpenSSL takes every byte out of the incoming one before
it asks for more, and what it puts into the outgoing one is taken out before a call returns, so that both are
empty between calls. A BIO never shrinks: with a pair of its own a connection would keep the size of the largest
piece it ever saw (44 KiB for one record each way). What a mistake here could mix is ciphertext, which the other
connection's keys do not open.
"""

from __future__ import annotations

import os
import ssl
import threading
from pathlib import Path

from cenote.errors import ConfigError
from cenote.wire.binding import server_end_point

ALPN = "postgresql"

_RECORD = 16384  # the most plaintext in one TLS record; reading this much empties a record
_PIECE = 262144  # bytes given to a BIO at a time: what bounds its size


class _Pipes(threading.local):
    """The BIOs of this thread; empty between calls."""

    def __init__(self) -> None:
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()


_pipes = _Pipes()


class TlsFilter:
    """One end of a TLS connection. A client's filter has its first flight `pending` at once.

    context: of `server_context` or `client_context`. server_hostname: what a client calls the server, for SNI
    and, where the context asks for it, to check the certificate against.

    :raises ValueError: a host name that cannot be in a certificate.

    Used in the thread that made it.
    """

    def __init__(self, context: ssl.SSLContext, *, server_side: bool, server_hostname: str | None = None) -> None:
        self._incoming = _pipes.incoming
        self._outgoing = _pipes.outgoing
        self._pending = b""
        self._object = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname
        )
        #: The handshake is done.
        self.established = False
        #: The other end said that it sends no more, or an error ended it: nothing will be received.
        self.closed = False
        if not server_side:
            self.receive(b"")

    def receive(self, ciphertext: bytes | memoryview) -> bytes:
        """Take what came from the other end; return the plaintext that is complete.

        It moves the handshake on and answers what TLS itself asks for: look at `pending` after each call.

        :raises ssl.SSLError: the handshake failed or the stream is broken. The alert about it is `pending`.
        """
        if len(ciphertext) > _PIECE:
            whole = memoryview(ciphertext)
            return b"".join([self.receive(whole[at : at + _PIECE]) for at in range(0, len(whole), _PIECE)])
        if self.closed:
            return b""
        try:
            self._incoming.write(ciphertext)
            if self.established or self._shake():
                return self._read()
            return b""
        except ssl.SSLError:
            self.closed = True
            raise
        finally:
            if self._incoming.pending:  # what follows an error or the end of the stream
                self._incoming.read()
            if self._outgoing.pending:
                self._pending += self._outgoing.read()

    def send(self, plaintext: bytes | memoryview) -> bytes:
        """Return what to write so that the other end receives `plaintext`, with all that was `pending`.

        :raises ssl.SSLError: the connection is not established, or closed.
        """
        if len(plaintext) > _PIECE:
            whole = memoryview(plaintext)
            return b"".join([self.send(whole[at : at + _PIECE]) for at in range(0, len(whole), _PIECE)])
        try:
            if plaintext:
                self._object.write(plaintext)
        finally:
            if self._outgoing.pending:
                self._pending += self._outgoing.read()
        return self.pending()

    def pending(self) -> bytes:
        """What TLS itself has to say, to be written: handshake, alerts, session tickets. Each byte once."""
        data = self._pending
        if data:
            self._pending = b""
        return data

    def close(self) -> bytes:
        """Return what ends the stream: what was pending, and close_notify. Nothing may be sent after it."""
        if self.established:
            try:
                self._object.unwrap()
            except ssl.SSLError:
                pass  # the other end's close_notify is not waited for; a broken stream has nothing to add
            finally:
                self._pending += self._outgoing.read()
        return self.pending()

    @property
    def alpn(self) -> str | None:
        """The protocol that ALPN chose."""
        return self._object.selected_alpn_protocol()

    @property
    def version(self) -> str | None:
        """The version of TLS, like "TLSv1.3"; None before the handshake."""
        return self._object.version()

    @property
    def cipher(self) -> str | None:
        """The name of the cipher; None before the handshake."""
        cipher = self._object.cipher()
        return cipher[0] if cipher else None

    @property
    def peer_certificate(self) -> bytes | None:
        """The other end's certificate as DER; None where it showed none."""
        return self._object.getpeercert(binary_form=True) if self.established else None

    @property
    def server_name(self) -> str:
        """At a server: what the client calls us (SNI), which is whatever it likes; "" where it does not."""
        return getattr(self._object, "asked_name", "")

    @property
    def binding(self) -> bytes | None:
        """At a server: what binds SCRAM to our certificate; None where it has no such thing."""
        return getattr(self._object.context, "binding", None)

    def _read(self) -> bytes:
        """All plaintext that is complete. OpenSSL reads no further than one record: when the BIO is empty after a
        read, so is the record, and asking again would only cost the exception that says so."""
        first = b""
        pieces = None
        while self._incoming.pending:
            try:
                piece = self._object.read(_RECORD)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:  # both ends have said that they are done
                piece = b""
            if not piece:
                self.closed = True
                break
            if not first:
                first = piece
            elif pieces is None:
                pieces = [first, piece]
            else:
                pieces.append(piece)
        return first if pieces is None else b"".join(pieces)

    def _shake(self) -> bool:
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        self.established = True
        return True


class _ServerObject(ssl.SSLObject):
    """A connection at a server. asked_name: what the client calls us."""

    asked_name = ""


class ServerContext(ssl.SSLContext):
    """The context for connections from clients. binding: of its certificate, for SCRAM; None: it has none."""

    sslobject_class = _ServerObject
    binding: bytes | None = None


def server_context(cert: str | Path, key: str | Path, ca: str | Path | None = None) -> ServerContext:
    """The context for connections from clients.

    cert: certificate chain, PEM, the server's own first. key: its private key, PEM, without a password.
    ca: who signs the certificates of clients, PEM. A client need not show one; one that cannot be verified ends
    the handshake. None: no certificate is asked for.

    :raises ConfigError: a file that cannot be read or used, or a key of another certificate.
    """
    context = ServerContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A client that renegotiates over and over has us do the expensive half of a handshake each time.
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols([ALPN])
    context.sni_callback = _note_name
    problems: list[str] = []
    try:
        _load_pair(context, cert, key)
        context.binding = server_end_point(_first_certificate(cert))
    except ConfigError as error:
        problems += error.problems
    if ca is not None:
        try:
            context.load_verify_locations(cafile=str(ca))
            context.verify_mode = ssl.CERT_OPTIONAL
        except OSError as error:
            problems.append(f'certificate authorities file "{ca}" cannot be used: {_why(error)}')
    if problems:
        raise ConfigError(problems)
    return context


def _note_name(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> None:
    if name is not None and isinstance(connection, _ServerObject):
        connection.asked_name = name


def _first_certificate(path: str | Path) -> bytes:
    """The DER of the first certificate in a PEM file; b"" where none can be read."""
    _, begin, rest = Path(path).read_text(encoding="ascii", errors="replace").partition(ssl.PEM_HEADER)
    body, end, _ = rest.partition(ssl.PEM_FOOTER)
    try:
        return ssl.PEM_cert_to_DER_cert(begin + body + end)
    except ValueError:
        return b""


def client_context(
    sslmode: str,
    rootcert: str | Path | None = None,
    cert: str | Path | None = None,
    key: str | Path | None = None,
    *,
    home: Path | None = None,
) -> ssl.SSLContext:
    """The context for connections to a server, with the meaning libpq gives to `sslmode`.

    sslmode: `allow`, `prefer`, `require`: whoever answers is believed, unless there is a root certificate: then
    the chain is checked, as libpq does. `verify-ca`: the chain is always checked. `verify-full`: also the name.
    rootcert: file with the certificates that are trusted, or "system" for the system's (`verify-full` only).
    cert, key: the client's own. home: where the files that are not named are looked for, `.postgresql/root.crt`,
    `postgresql.crt`, `postgresql.key`; default: the user's home. A file that is named and missing is an error,
    also where libpq would go on without it.

    :raises ConfigError: all that is wrong with it.
    """
    if sslmode not in ("allow", "prefer", "require", "verify-ca", "verify-full"):
        raise ConfigError(
            [f"sslmode={sslmode}: allow, prefer, require, verify-ca or verify-full make a TLS context"]
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = sslmode == "verify-full"
    context.options |= ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols([ALPN])
    folder = (home or _home()) / ".postgresql"
    _load_roots(context, sslmode, rootcert, folder)
    if cert is None and key is None:
        own = folder / "postgresql.crt"
        if own.is_file():
            _load_pair(context, own, folder / "postgresql.key")
    else:
        _load_pair(context, cert or folder / "postgresql.crt", key or folder / "postgresql.key")
    return context


def _load_roots(context: ssl.SSLContext, sslmode: str, rootcert: str | Path | None, folder: Path) -> None:
    if rootcert == "system":
        if sslmode != "verify-full":
            # Anybody can have a certificate of a public authority: without the host name it says nothing.
            raise ConfigError([f"sslrootcert=system needs sslmode=verify-full; it is {sslmode}"])
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        return
    roots = Path(rootcert) if rootcert else folder / "root.crt"
    if not roots.exists():
        if sslmode.startswith("verify") or rootcert:
            raise ConfigError(
                [
                    f'root certificate file "{roots}" does not exist: provide it as sslrootcert, use the system\'s'
                    " with sslrootcert=system and sslmode=verify-full, or choose an sslmode that does not verify"
                ]
            )
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return
    try:
        context.load_verify_locations(cafile=str(roots))
    except OSError as error:
        raise ConfigError([f'root certificate file "{roots}" cannot be used: {_why(error)}']) from error


def _load_pair(context: ssl.SSLContext, cert: str | Path, key: str | Path) -> None:
    missing = [
        f'{what} file "{path}" {"is not a file" if os.path.exists(path) else "does not exist"}'
        for what, path in (("certificate", cert), ("private key", key))
        if not os.path.isfile(path)
    ]
    if missing:
        raise ConfigError(missing)
    try:
        # Without a function here, OpenSSL would ask for the password on the terminal.
        context.load_cert_chain(str(cert), str(key), password=_no_password)
    except ConfigError as error:
        raise ConfigError(
            [f'private key file "{key}" is encrypted: a daemon needs one without a password']
        ) from error
    except OSError as error:
        raise ConfigError(
            [f'certificate "{cert}" with private key "{key}" cannot be used: {_why(error)}']
        ) from error


def _no_password() -> str:
    raise ConfigError(["no password"])


def _why(error: OSError) -> str:
    reason = getattr(error, "reason", None) or error.strerror or str(error)
    return str(reason).lower().replace("_", " ") if isinstance(error, ssl.SSLError) else str(reason)


def _home() -> Path:
    return Path(os.path.expanduser("~"))
