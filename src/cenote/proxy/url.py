"""A configuration from a connection string, with no file: one database, one user, who may also use the console.

The string is read as libpq reads it: URL or `key=value`, what it leaves out from a service file and the PG*
environment, the password last from the password file. This is the one place of the daemon that reads the
environment. It refuses what would weaken the connection if we left it out, and a start without any password:
nobody is ever let in on trust here.

Source: PostgreSQL documentation, libpq, "Connection Strings", "The Password File", "The Connection Service File".
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cenote.errors import ConfigError, MissingDependency
from cenote.proxy.config import Config, config_of
from cenote.proxy.log import get_log
from cenote.proxy.problems import CONSOLE, near

log = get_log("cenote.proxy")

# What is handed on to the connections under the same name.
_CARRIED = ("sslmode", "sslrootcert", "sslcert", "sslkey", "sslnegotiation")
# Left out, these would make a connection less safe than was asked, or another one: value that changes nothing.
_REFUSED = {
    "channel_binding": ("prefer", "disable"),
    "require_auth": (),
    "requirepeer": (),
    "sslcrl": (),
    "sslcrldir": (),
    "sslpassword": (),
    "sslcertmode": ("allow",),
    "gssencmode": ("disable", "prefer"),
    "ssl_min_protocol_version": ("TLSv1", "TLSv1.1", "TLSv1.2"),
    "ssl_max_protocol_version": ("TLSv1.3",),
    "options": (),
    "replication": ("false", "off", "no", "0"),
    "load_balance_hosts": ("disable",),
}
_INSTEAD = {
    "options": "use `init_query` in a configuration file",
    "load_balance_hosts": "hosts are tried in order",
}
_SOCKET_DIRS = ("/var/run/postgresql", "/tmp")
_DEFAULT_PORT = "5432"
_OTHERS_BITS = stat.S_IRWXG | stat.S_IRWXO


def config_of_url(url: str | None = None, **overrides: Any) -> Config:
    """The configuration of `cenote serve URL`.

    :param url: `postgresql://...` or `key=value ...`; None or "": all comes from the environment
    :param overrides: tables and values beside those of the URL, such as `listen={"port": 6432}`
    :raises ConfigError: every problem, a missing password included.
    :raises MissingDependency: psycopg is not installed; its libpq reads the string.
    """
    known = resolved(url or "")
    problems = list(_problems(known))
    user = known.get("user")
    if user is None:
        # The account has no name: containers often run under a bare number.
        raise ConfigError([*problems, "user: none is given, and this account has no name; give it, or PGUSER"])
    hosts, ports = _place(known)
    name = known.get("dbname") or user
    password = known.get("password")
    if password is None:
        try:
            password = _from_file(known, hosts, ports, name, user)
        except ConfigError as error:
            problems += error.problems
        else:
            if password is None:
                problems.append(_no_password(known, hosts[0], ports[0], name, user))
    if name == CONSOLE:
        problems.append(
            f"the database {name!r}: this name is the virtual database's; use a file, where `dbname` is"
        )
    if problems:
        raise ConfigError(problems)
    port = ",".join(ports)
    database: dict[str, Any] = {
        "host": ",".join(hosts),
        "port": int(port) if port.isdecimal() else port,
        "dbname": name,
    }
    database |= {key: known[key] for key in _CARRIED if known.get(key)}
    wait = int(known.get("connect_timeout") or "0")
    if wait > 0:
        database["connect_timeout"] = float(wait)
    values: dict[str, Any] = {
        "databases": {name: database},
        "users": {user: {"password": password, "server_password": password}},
        "admin_users": [user],
    }
    return config_of(merged(values, overrides), complete=True)


def merged(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables, where those of `more` win."""
    result = dict(values)
    for key, value in more.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def resolved(url: str) -> dict[str, str]:
    """All that libpq would connect with, but for the password file.

    :raises ConfigError: no connection string, or a service that is in no file.
    """
    try:
        import psycopg
        from psycopg.conninfo import conninfo_to_dict
        from psycopg.pq import Conninfo
    except ImportError:
        raise MissingDependency('reading a connection string needs psycopg: pip install "cenote[proxy]"') from None
    if not _is_text(url):
        raise ConfigError(["no connection string: it is not UTF-8"])
    try:
        given = {key: str(value) for key, value in conninfo_to_dict(url).items() if value is not None}
    except psycopg.ProgrammingError as error:
        raise ConfigError([f"no connection string: {str(error).strip()}"]) from None
    service = given.get("service") or os.environ.get("PGSERVICE")
    if service:
        _check_service(service, {known.keyword.decode() for known in Conninfo.get_defaults()})
    before = os.environ.get("PGSERVICE")
    try:
        if service:
            os.environ["PGSERVICE"] = service  # libpq takes the name of a service from nowhere else here
        options = Conninfo.get_defaults()
    finally:
        if service:
            if before is None:
                del os.environ["PGSERVICE"]
            else:
                os.environ["PGSERVICE"] = before
    defaults = {known.keyword.decode(): os.fsdecode(known.val) for known in options if known.val}
    known = {**defaults, **{key: value for key, value in given.items() if value != ""}}
    strange = [f"{key}: it is not UTF-8" for key, value in known.items() if not _is_text(value)]
    if strange:
        raise ConfigError(strange)
    return known


def _check_service(service: str, keywords: set[str]) -> None:
    """libpq hands out what it could read of a service and keeps its errors to itself.

    :raises ConfigError: no file has the service, or a line of it is wrong: left out, the connection is another.
    """
    files = _service_files()
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        inside, problems = False, []
        for number, line in enumerate(map(str.strip, lines), start=1):
            if line.startswith("["):
                if inside:
                    break
                inside = line == f"[{service}]"
            elif inside and line and not line.startswith("#"):
                key, equals, _ = line.partition("=")
                if not equals or key not in keywords or key == "service":
                    shown = f"{key}: unknown key{near(key, keywords)}" if equals else "must be key=value"
                    problems.append(f"{file}: line {number}: service {service!r}: {shown}")
        if problems:
            raise ConfigError(problems)
        if inside:
            return
    raise ConfigError([f"service {service!r}: in none of {', '.join(map(str, files))}"])


def _service_files() -> list[Path]:
    own = os.environ.get("PGSERVICEFILE")
    files = [Path(own) if own else _home() / ".pg_service.conf"]
    files.append(Path(os.environ.get("PGSYSCONFDIR", "/etc/postgresql-common")) / "pg_service.conf")
    return files


def _home() -> Path:
    return Path(os.path.expanduser("~"))  # Path.home raises where an account has neither name nor HOME


def _problems(known: Mapping[str, str]) -> Iterator[str]:
    wanted = known.get("target_session_attrs", "any")
    if wanted != "any":
        yield (
            f"target_session_attrs = {wanted!r}: not supported; the first host that answers is used "
            "(allowed is 'any')"
        )
    for key, harmless in _REFUSED.items():
        value = known.get(key)
        if value and value not in harmless:
            instead = f"; {_INSTEAD[key]}" if key in _INSTEAD else ""
            yield f"{key} = {value!r}: not supported for connections to the server{instead}"
    wait = known.get("connect_timeout") or "0"
    if not re.fullmatch(r"\s*[+-]?[0-9]+\s*", wait):
        yield f"connect_timeout = {wait!r}: must be a whole number of seconds"
    if known.get("hostaddr") and known.get("host") and known.get("sslmode") == "verify-full":
        yield "hostaddr: with sslmode = 'verify-full' give the host alone, whose name the certificate has"


def _is_text(value: str) -> bool:
    """Whether bytes that came from the environment or a file were UTF-8."""
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


def _place(known: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Hosts, and one port or as many. No host is the Unix socket that is there, else the loopback address."""
    ports = [port.strip() or _DEFAULT_PORT for port in (known.get("port") or "").split(",")]
    hosts = (known.get("hostaddr") or known.get("host") or "").split(",")
    return [host.strip() or _default_host(ports[0]) for host in hosts], ports


def _default_host(port: str) -> str:
    for place in _SOCKET_DIRS:
        if Path(place, f".s.PGSQL.{port}").is_socket():
            return place
    return "127.0.0.1"


# -- the password file ----------------------------------------------------------------------------------------


def passfile_of(known: Mapping[str, str]) -> Path:
    """Where the password file is, or would be."""
    given = known.get("passfile")
    return Path(given) if given else _home() / ".pgpass"


def password_in(lines: Iterable[str], host: str, port: str, database: str, user: str) -> str | None:
    """The password of the first line that fits, or None. `host`: for a Unix socket its directory."""
    wanted = (host, port, database, user)
    names = [("localhost" if host in _SOCKET_DIRS else host, *wanted[1:]), wanted]
    for line in lines:
        if line.startswith("#"):
            continue
        fields = _fields(line.rstrip("\r\n"))
        if len(fields) >= 5 and any(
            all(raw == "*" or plain == is_ for (raw, plain), is_ in zip(fields, name, strict=False))
            for name in names
        ):
            return fields[4][1]
    return None


def _fields(line: str) -> list[tuple[str, str]]:
    r"""The fields as they stand and without escapes: `\:` and `\\` are the characters themselves."""
    fields: list[tuple[str, str]] = []
    raw = plain = ""
    escaped = False
    for letter in line:
        if letter == ":" and not escaped and len(fields) < 4:
            fields.append((raw, plain))
            raw = plain = ""
            continue
        raw += letter
        if letter == "\\" and not escaped:
            escaped = True
            continue
        plain += letter
        escaped = False
    return [*fields, (raw, plain)]


def _from_file(known: Mapping[str, str], hosts: list[str], ports: list[str], name: str, user: str) -> str | None:
    """The password file's password for this server, or None.

    :raises ConfigError: several hosts have several passwords: a pool logs in with one.
    """
    lines = _readable(passfile_of(known))
    named = known.get("host")
    if named and len(named.split(",")) == len(hosts):
        hosts = [part or host for part, host in zip(named.split(","), hosts, strict=True)]
    ports = ports * len(hosts) if len(ports) == 1 else ports
    found = {password_in(lines, *place, name, user) for place in zip(hosts, ports, strict=False)} - {None, ""}
    if len(found) > 1:
        raise ConfigError([f"{passfile_of(known)}: different passwords for the hosts {', '.join(hosts)}"])
    password = found.pop() if found else None
    if password is not None and not _is_text(password):
        raise ConfigError([f"{passfile_of(known)}: the password of user {user!r} is not UTF-8"])
    return password


def _readable(path: Path) -> list[str]:
    """The lines of the password file; none, with a warning, where others may read it."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            log.warning("password_file_ignored", path=path, reason="not_a_plain_file")
            return []
        if mode & _OTHERS_BITS:
            log.warning("password_file_ignored", path=path, reason="others_may_read_it", mend=f"chmod 0600 {path}")
            return []
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _no_password(known: Mapping[str, str], host: str, port: str, name: str, user: str) -> str:
    host = (known.get("host") or "").split(",", maxsplit=1)[0] or host
    place = f"{f'[{host}]' if ':' in host else quote(host, safe='')}:{port}"
    line = ":".join(
        field.replace("\\", "\\\\").replace(":", "\\:")
        for field in ("localhost" if host in _SOCKET_DIRS else host, port, name, user)
    )
    return (
        f"no password is known for user {user!r} at {host}:{port}, and clients must prove that they know it. "
        f"Give it in the URL (postgresql://{quote(user, safe='')}:PASSWORD@{place}/{quote(name, safe='')}), "
        f"or in the environment (PGPASSWORD), or in the password file ({passfile_of(known)}, mode 0600, "
        f"a line {line}:PASSWORD)"
    )
