"""How libpq got to a server, so that the same way can be gone again by hand, step by step.

libpq connects once and is asked what came of the URL, the service file, the environment and the password file:
host, address, user, password, TLS or not. What it keeps to and this could not is refused, not left out.
"""

import ipaddress
import socket
import ssl
from dataclasses import dataclass
from typing import Any

from cenote.errors import ConfigError, MissingDependency, TargetUnusable
from cenote.measure.target import APPLICATION, CONNECT_TIMEOUT_S, one_line
from cenote.proxy.url import resolved
from cenote.wire.tls import client_context

# Left out, these would make our connection another one, or one less safe than asked for.
_REFUSED = ("requirepeer", "require_auth", "sslcrl", "sslcrldir", "sslpassword", "replication")


@dataclass(frozen=True, slots=True)
class Address:
    """The way to one server.

    host: as given; what is looked up, and what the certificate is checked against
    family, sockaddr: for connect(2), of the address that libpq reached
    lookup: whether a name has to be looked up before
    startup: what the startup packet says
    asks_tls: whether TLS is asked for, as sslmode has it; where `tls` is None the answer is no
    direct: TLS without asking first (sslnegotiation=direct)
    binding_required: channel_binding=require
    """

    host: str
    port: int
    family: int
    sockaddr: Any
    lookup: bool
    user: str
    password: str | None
    startup: tuple[tuple[str, str], ...]
    asks_tls: bool
    tls: ssl.SSLContext | None
    direct: bool
    binding_required: bool

    @property
    def unix(self) -> bool:
        """Whether this is a Unix socket."""
        return self.family == socket.AF_UNIX


def address_of(dsn: str) -> Address:
    """Where libpq comes to with this URL, and how. One connection, closed again.

    :raises TargetUnusable: it does not come through
    :raises ConfigError: it keeps to something that is not known here
    """
    try:
        import psycopg
    except ImportError:
        raise MissingDependency(
            'this needs psycopg, which is not installed: pip install "cenote[measure]"'
        ) from None
    given = resolved(dsn)
    problems = [f"{key} = {given[key]!r}: `cenote cost` cannot keep to it" for key in _REFUSED if given.get(key)]
    if given.get("gssencmode") == "require":
        problems.append("gssencmode = 'require': `cenote cost` does not speak GSSAPI")
    if problems:
        raise ConfigError(problems)
    try:
        with psycopg.connect(dsn, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S) as conn:
            pgconn = conn.pgconn
            used = {option.keyword.decode(): (option.val or b"").decode() for option in pgconn.info}
            used |= {
                "host": _text(pgconn.host),
                "hostaddr": _text(pgconn.hostaddr),
                "port": _text(pgconn.port),
                "password": _text(pgconn.password),
            }
            return _address(used, given, secure=bool(pgconn.ssl_in_use))
    except psycopg.Error as error:
        raise TargetUnusable(f"cannot measure this server: {one_line(error)}") from None


def _text(value: bytes | None) -> str:
    return (value or b"").decode()


def _address(used: dict[str, str], given: dict[str, str], *, secure: bool) -> Address:
    host, port = used["host"] or used["hostaddr"], int(used["port"])
    family, sockaddr = _endpoint(host, used["hostaddr"], port)
    unix = family == socket.AF_UNIX
    sslmode = used.get("sslmode") or "prefer"
    user = used["user"]
    startup = {"user": user, "database": used["dbname"], "application_name": APPLICATION}
    for key in ("application_name", "client_encoding", "options"):
        if given.get(key) and given[key] != "auto":
            startup[key] = given[key]
    return Address(
        host=host,
        port=port,
        family=family,
        sockaddr=sockaddr,
        lookup=not unix and not given.get("hostaddr") and not is_number(host),
        user=user,
        password=used["password"] or None,
        startup=tuple(startup.items()),
        asks_tls=not unix and (secure or sslmode not in ("disable", "allow")),
        tls=_context(sslmode, given) if secure else None,
        direct=given.get("sslnegotiation") == "direct",
        binding_required=given.get("channel_binding") == "require",
    )


def _endpoint(host: str, hostaddr: str, port: int) -> tuple[int, Any]:
    if host.startswith(("/", "@")):
        path = f"{host}/.s.PGSQL.{port}"
        return socket.AF_UNIX, "\0" + path[1:] if host.startswith("@") else path
    try:
        family, _, _, _, sockaddr = socket.getaddrinfo(hostaddr or host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise TargetUnusable(f"cannot measure this server: {host}: {one_line(error)}") from None
    return family, sockaddr


def is_number(host: str) -> bool:
    """Whether this is an address already, and no name that has to be looked up."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _context(sslmode: str, given: dict[str, str]) -> ssl.SSLContext:
    context = client_context(sslmode, given.get("sslrootcert"), given.get("sslcert"), given.get("sslkey"))
    for key, bound in (
        ("ssl_min_protocol_version", "minimum_version"),
        ("ssl_max_protocol_version", "maximum_version"),
    ):
        version = getattr(ssl.TLSVersion, given.get(key, "").replace(".", "_"), None)
        if version is not None:
            setattr(context, bound, version)
    return context
