"""The proxies under test, each a process of its own with the same sizes, log-ins and certificate.

Clients log in with SCRAM against the server's own verifier, and the proxies at the server with SCRAM as well. What
is not set here is each one's default. They are started together and idle while the other one works.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.proxy.client import Client, Failed
from benchmarks.proxy.gauge import Used, gone_with_us, pss_kib, used
from cenote.embedded import Postgres
from cenote.embedded.install import pick_account
from cenote.embedded.places import free_port

SERVERS = 8
MAX_CLIENTS = 10_000
CENOTE, PGBOUNCER, OTHER = "Cenote", "PgBouncer", "other Cenote"
_START_S = 20.0
_STOP_S = 10.0
_WHAT = """
import cenote
from cenote import _build
print(cenote.__version__, "compiled" if _build.is_compiled() else "NOT compiled", "from", cenote.__path__[0])
"""


class NotThere(Failed):
    """A contestant is not installed."""


@dataclass(frozen=True, slots=True)
class Site:
    """What the contestants share. `folder` may be read by the account that PgBouncer runs as."""

    server: Postgres
    folder: Path
    certificate: Path
    key: Path
    processors: set[int] | None

    @property
    def verifier(self) -> str:
        """The server's own. PgBouncer logs in there with what clients have shown it, so it must be the same."""
        return self.server.psql(f"SELECT rolpassword FROM pg_authid WHERE rolname = '{self.server.user}'").strip()


class Proxy(ABC):
    """One running proxy. `version` says what it is."""

    name: str
    version: str

    def __init__(self, site: Site) -> None:
        self.site = site
        self.port = free_port()
        self._folder = site.folder / f"{self.name.replace(' ', '-')}-{self.port}"
        self._folder.mkdir()
        self._account = pick_account()
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def _prepared(self) -> tuple[Sequence[str], bool]:
        """Write the files and return the command, and whether it runs as the unprivileged account."""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until a client is served.

        :raises Failed: it is not, with the end of its log.
        """
        command, demoted = self._prepared()
        arguments = self._account.popen_args() if demoted else {}
        with (self._folder / "output").open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us; we end it
                preexec_fn=gone_with_us(self.site.processors),  # noqa: PLW1509 - no thread runs here
                **arguments,
            )
        give_up = time.monotonic() + _START_S
        while True:
            try:
                with self.client() as client:
                    client.query("SELECT 1")
                return
            except (OSError, Failed) as error:
                if self._process.poll() is not None or time.monotonic() > give_up:
                    said = self._log()
                    self.close()
                    raise Failed(f"{self.name} does not serve: {error}\n{said}") from None
            time.sleep(0.05)

    def client(self, *, tls: bool = False) -> Client:
        """A new client that is logged in."""
        server = self.site.server
        return Client(self.port, server.user, server.password, server.database, tls=tls)

    def used(self) -> Used:
        return used(self.pid)

    def pss_kib(self) -> int:
        """Its memory, shared pages shared out."""
        path = Path(f"/proc/{self.pid}/smaps_rollup")
        try:
            text = path.read_text()
        except PermissionError:  # of another account: even root may lack the capability
            text = self._account.run(["cat", str(path)], cwd=self._folder, what="read memory")
        return pss_kib(text)

    def close(self) -> None:
        """End it; nothing if it is not running."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _log(self) -> str:
        return "\n".join((self._folder / "output").read_text(errors="replace").splitlines()[-15:])


class Cenote(Proxy):
    """`cenote serve`, run by this interpreter or by another one with another Cenote."""

    def __init__(self, site: Site, name: str = CENOTE, python: str = sys.executable) -> None:
        self.name = name
        self._python = os.path.abspath(python)  # not resolved: the link says which environment it is
        self.version = _answer([self._python, "-c", _WHAT])
        super().__init__(site)

    def _prepared(self) -> tuple[Sequence[str], bool]:
        server = self.site.server
        config = self._folder / "cenote.toml"
        config.write_text(
            cenote_toml(
                port=self.port,
                server_port=server.port,
                database=server.database,
                user=server.user,
                password=server.password,
                verifier=self.site.verifier,
                certificate=self.site.certificate,
                key=self.site.key,
            )
        )
        return [self._python, "-m", "cenote.cli", "serve", "--config", str(config)], False


class PgBouncer(Proxy):
    """The binary that `PGBOUNCER` names, or Debian's."""

    name = PGBOUNCER

    def __init__(self, site: Site) -> None:
        self._binary = binary()
        self.version = _answer([self._binary, "--version"]).splitlines()[0].removeprefix("PgBouncer ")
        super().__init__(site)

    @property
    def has_prepared(self) -> bool:
        """Whether it knows prepared statements in transaction mode."""
        return release(self.version) >= (1, 21)

    def _prepared(self) -> tuple[Sequence[str], bool]:
        server = self.site.server
        users = self._folder / "users.txt"
        users.write_text(f'"{server.user}" "{self.site.verifier}"\n')
        config = self._folder / "pgbouncer.ini"
        config.write_text(
            pgbouncer_ini(
                port=self.port,
                server_port=server.port,
                database=server.database,
                user=server.user,
                password=server.password,
                users=users,
                certificate=self.site.certificate,
                key=self.site.key,
                prepared=self.has_prepared,
            )
        )
        return [self._binary, str(config)], True


def cenote_toml(
    *,
    port: int,
    server_port: int,
    database: str,
    user: str,
    password: str,
    verifier: str,
    certificate: Path,
    key: Path,
) -> str:
    """Cenote's configuration file."""
    return f"""\
log_level = "warning"

[listen]
host = "127.0.0.1"
port = {port}
tls_cert = "{certificate}"
tls_key = "{key}"
tls_mode = "allow"
max_clients = {MAX_CLIENTS}

[pool]
min_size = {SERVERS}
max_size = {SERVERS}
mode = "transaction"

[databases.{database}]
host = "127.0.0.1"
port = {server_port}
sslmode = "disable"
user = "{user}"
password = "{password}"

[users.{user}]
password = "{verifier}"
"""


def pgbouncer_ini(
    *,
    port: int,
    server_port: int,
    database: str,
    user: str,
    password: str,
    users: Path,
    certificate: Path,
    key: Path,
    prepared: bool,
) -> str:
    """PgBouncer's configuration file."""
    return f"""\
[databases]
{database} = host=127.0.0.1 port={server_port} dbname={database} user={user} password={password}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {users}
client_tls_sslmode = allow
client_tls_cert_file = {certificate}
client_tls_key_file = {key}
server_tls_sslmode = disable
pool_mode = transaction
default_pool_size = {SERVERS}
min_pool_size = {SERVERS}
max_client_conn = {MAX_CLIENTS}
log_connections = 0
log_disconnections = 0
log_stats = 0
{"max_prepared_statements = 200" if prepared else ""}
"""


def binary() -> str:
    """PgBouncer's.

    :raises NotThere: there is none.
    """
    named = os.environ.get("PGBOUNCER")
    found = shutil.which(named or "pgbouncer", path=None if named else f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        raise NotThere(f"no PgBouncer: {named or 'install it, or name it with PGBOUNCER=path'}")
    return str(Path(found).absolute())


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, to be compared."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _answer(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failed(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip()
