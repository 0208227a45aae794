"""`Postgres`: one private server, from its empty directory to its end.

It starts, stops, crashes and reconfigures a cluster, and tells how to reach it. It refuses everything that
needs a driver or a pool: set-up runs through the wheel's own psql. One object is for one thread.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import quote

from cenote.embedded.cluster import lock_kept, must_be_version, new_cluster
from cenote.embedded.configuration import (
    DEFAULT_SETTINGS,
    HOST,
    SUPERUSER,
    Auth,
    Setting,
    pg_hba_conf,
    pg_ident_conf,
    postgresql_conf,
    set_up_sql,
)
from cenote.embedded.install import Account, Install, find_install, pick_account
from cenote.embedded.janitor import Janitor, kill_tree
from cenote.embedded.places import free_port, run_dir_place
from cenote.errors import EmbeddedError

StopMode = Literal["fast", "immediate", "smart"]
_SIGNALS: Mapping[str, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}
_POLL_S = 0.005
_PORT_ATTEMPTS = 5
_LOG_TAIL_LINES = 20


class Postgres:
    """A private PostgreSQL server, gone with this process.

    version: major version, 16 or 18.
    settings: server settings (postgresql.conf) on top of `DEFAULT_SETTINGS`.
    database, user: made by the first start; the user owns the database and is no superuser.
    password: of `user` and of the superuser; default: generated.
    port: TCP port on 127.0.0.1; 0 takes a free one, which the server then keeps over restarts.
    keep: a directory for the cluster that outlives this object; a later start with the same directory finds
        its data again. Default: the data goes with the server.
    auth: how TCP and socket clients prove who they are; the superuser of the same system user needs no
        password through the socket.
    hba: lines of pg_hba.conf that come before the defaults.
    files: files to place in the data directory, name to content, readable for the server only.
    bin_dir: use the binaries of another installation instead of the wheel's; `version` is then theirs.
    start_timeout: seconds from launch to "ready" (and for crash recovery).

    Raises, all from `start`: `MissingDependency` without the wheel, `EmbeddedError` for anything else, with
    the server's own words. Use it in a `with` statement, or call `start` and `close`.
    """

    def __init__(
        self,
        version: int = 18,
        *,
        settings: Mapping[str, Setting] | None = None,
        database: str = "app",
        user: str = "app",
        password: str | None = None,
        port: int = 0,
        keep: str | os.PathLike[str] | None = None,
        auth: Auth = "scram-sha-256",
        hba: Sequence[str] = (),
        files: Mapping[str, bytes] | None = None,
        bin_dir: str | os.PathLike[str] | None = None,
        start_timeout: float = 30.0,
    ) -> None:
        self.version = version
        self.settings: dict[str, Setting] = {**DEFAULT_SETTINGS, **(settings or {})}
        self.host = HOST
        self.port = port
        self.user = user
        self.password = secrets.token_hex(12) if password is None else password
        self.database = database
        self._any_port = port == 0
        self._auth = auth
        self._hba = tuple(hba)
        self._files = dict(files or {})
        self._bin_dir = bin_dir
        self._keep = None if keep is None else Path(keep).absolute()
        self._start_timeout_s = start_timeout
        self._owner_pid = os.getpid()
        self._account: Account | None = None
        self._install: Install | None = None
        self._run_dir: Path | None = None
        self._janitor: Janitor | None = None
        self._finalizer: weakref.finalize[[], Postgres] | None = None

    # -- where it is ------------------------------------------------------------------------------------

    @property
    def dsn(self) -> str:
        """`postgresql://` URL of `user` and `database` over TCP."""
        return self.dsn_for()

    @property
    def superuser_dsn(self) -> str:
        """`postgresql://` URL of the superuser `postgres` on `database` over TCP."""
        return self.dsn_for(user=SUPERUSER)

    @property
    def socket_dsn(self) -> str:
        """`postgresql://` URL of `user` and `database` through the Unix socket."""
        login = f"{quote(self.user, safe='')}:{quote(self.password, safe='')}"
        where = f"host={quote(str(self.socket_dir), safe='')}&port={self.port}"
        return f"postgresql://{login}@/{quote(self.database, safe='')}?{where}"

    def dsn_for(self, *, user: str | None = None, password: str | None = None, database: str | None = None) -> str:
        """Return a `postgresql://` URL over TCP; what is not given is as in `dsn`."""
        words = [
            self.user if user is None else user,
            self.password if password is None else password,
            self.database if database is None else database,
        ]
        name, secret, base = (quote(word, safe="") for word in words)
        return f"postgresql://{name}:{secret}@{self.host}:{self.port}/{base}"

    @property
    def socket_dir(self) -> Path:
        """The directory of the Unix socket: what libpq calls host. Raises `EmbeddedError` before `start`."""
        return self._made()

    @property
    def data_dir(self) -> Path:
        """The cluster's data directory. Raises `EmbeddedError` before `start`."""
        return (self._made() if self._keep is None else self._keep) / "data"

    @property
    def log_path(self) -> Path:
        """The file with all the server says. Raises `EmbeddedError` before `start`."""
        return self._made() / "server.log"

    def log(self) -> str:
        """Return all that the server has logged, over all restarts."""
        return self.log_path.read_text(errors="replace")

    @property
    def bin_dir(self) -> Path:
        """The directory with `postgres`, `psql`, `pgbench` and so on of this version."""
        return self._installed().bin_dir

    def binary(self, name: str) -> Path:
        """Return the path of one of the installation's programs, such as "pgbench".

        Raises `EmbeddedError` when it has no such program.
        """
        path = self.bin_dir / name
        if not path.is_file():
            raise EmbeddedError(f"PostgreSQL {self.version} in {self.bin_dir} has no program {name!r}")
        return path

    @property
    def pid(self) -> int:
        """Process id of the postmaster. Raises `EmbeddedError` when it does not run."""
        process = self._server()
        if process is None:
            raise EmbeddedError(f"PostgreSQL {self.version} is not running")
        return process.pid

    @property
    def running(self) -> bool:
        """Whether the postmaster is alive. False in a forked child, which does not own it."""
        return self._server() is not None

    # -- life ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"at {self.host}:{self.port}" if self.running else "not running"
        return f"<{type(self).__name__} {self.version} {state}>"

    def start(self) -> None:
        """Start the server and return when it accepts connections; nothing when it already runs.

        The first start makes the cluster, the role and the database. Raises `MissingDependency`,
        `EmbeddedError`; after a failed first start nothing is left behind.
        """
        self._must_own()
        if self.running:
            return
        if self._janitor is not None:
            self._launch()
            return
        self._found()
        try:
            self._make_cluster()
            self._launch()
            self._make_role_and_database()
        except BaseException:
            self.close()
            raise

    def stop(self, mode: StopMode = "fast", *, timeout: float = 30.0) -> None:
        """Stop the server and keep its data for the next `start`.

        mode: "smart" waits for clients to leave, "fast" rolls back and disconnects them, "immediate" drops
            everything and recovers at the next start.
        timeout: seconds to wait.

        Does nothing when the server is not running, and in a forked child. Raises `EmbeddedError` when it
        still runs after `timeout`; a harder mode may follow.
        """
        process = self._server()
        if process is None:
            return
        process.send_signal(_SIGNALS[mode])
        self._collect(process, timeout, f"did not stop within {timeout:g} s in mode {mode!r}")

    def restart(
        self, mode: StopMode = "fast", *, settings: Mapping[str, Setting] | None = None, timeout: float = 30.0
    ) -> None:
        """`stop`, take over changed `settings`, `start` on the same port.

        Raises as these do. When it does not start with the changed settings they are forgotten, and the
        server stays stopped.
        """
        self._must_own()
        self.stop(mode, timeout=timeout)
        before = dict(self.settings)
        self.settings.update(settings or {})
        try:
            self.start()
        except EmbeddedError:
            self.settings = before
            raise

    def reload(self, settings: Mapping[str, Setting] | None = None) -> None:
        """Take over changed `settings` without a restart; sessions opened from now on have them.

        Raises `EmbeddedError` for a setting that is wrong or needs a restart; then nothing has changed.
        """
        process = self._running_server()
        before = dict(self.settings)
        self.settings.update(settings or {})
        self._write_settings()
        problems = self.psql("SELECT format('%s: %s', name, error) FROM pg_file_settings WHERE error IS NOT NULL")
        if problems:
            self.settings = before
            self._write_settings()
            raise EmbeddedError(f"cannot reload: {problems}")
        process.send_signal(signal.SIGHUP)

    def kill(self) -> None:
        """SIGKILL the postmaster and all its backends, as a power failure would; `start` recovers."""
        process = self._running_server()
        kill_tree(process.pid, timeout=5.0)
        self._collect(process, 5.0, "did not die of SIGKILL within 5 s")

    def close(self) -> None:
        """Stop the server and remove all it left (but for `keep`). Calling it again does nothing.

        In a forked child it does nothing.
        """
        if self._janitor is None or self._is_foreign():
            return
        if self._keep is not None:
            with contextlib.suppress(EmbeddedError):
                self.stop("fast", timeout=10.0)
        self._janitor.finish()
        self._janitor = self._run_dir = None
        if self._finalizer is not None:
            self._finalizer.detach()

    def psql(self, sql: str, *, database: str | None = None) -> str:
        """Run SQL as the superuser with the installation's own psql, each statement by itself.

        Returns the rows, one a line, columns separated by "|". Raises `EmbeddedError` with the server's
        words when a statement fails; the ones after it do not run.
        """
        command = [str(self.binary("psql")), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]
        command += ["-h", str(self.socket_dir), "-p", str(self.port), "-U", SUPERUSER]
        command += ["-d", database or self.database]
        environment = {"PATH": os.defpath, "LC_ALL": "C", "PGCLIENTENCODING": "UTF8"}
        done = subprocess.run(command, input=sql.encode(), capture_output=True, env=environment, check=False)
        if done.returncode != 0:
            raise EmbeddedError(f"psql failed: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout.decode(errors="replace").rstrip("\n")

    # -- inside -------------------------------------------------------------------------------------------

    def _is_foreign(self) -> bool:
        """Tell whether we are in a fork()ed child of the process that made this object."""
        return os.getpid() != self._owner_pid

    def _must_own(self) -> None:
        if self._is_foreign():
            raise EmbeddedError(
                f"this PostgreSQL belongs to process {self._owner_pid}; a forked child may only connect to it"
            )

    def _server(self) -> "subprocess.Popen[bytes] | None":
        """The running postmaster, or None; collects the exit of one that died."""
        if self._janitor is None or self._is_foreign():
            return None
        process = self._janitor.server
        if process is not None and process.poll() is not None:
            self._janitor.server = process = None
        return process

    def _running_server(self) -> "subprocess.Popen[bytes]":
        self._must_own()
        process = self._server()
        if process is None:
            raise EmbeddedError(f"PostgreSQL {self.version} is not running")
        return process

    def _collect(self, process: "subprocess.Popen[bytes]", timeout: float, problem: str) -> None:
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise EmbeddedError(f"PostgreSQL {self.version} (process {process.pid}) {problem}") from None
        if self._janitor is not None:
            self._janitor.server = None

    def _made(self) -> Path:
        if self._run_dir is None:
            raise EmbeddedError(f"PostgreSQL {self.version} has no directory: it has not been started")
        return self._run_dir

    def _found(self) -> Account:
        if self._account is None:
            self._account = pick_account()
        return self._account

    def _installed(self) -> Install:
        if self._install is None:
            self._install = find_install(self.version, self._bin_dir, self._found())
            self.version = self._install.version
        return self._install

    def _make_cluster(self) -> None:
        install, account = self._installed(), self._found()
        lock = None if self._keep is None else lock_kept(self._keep, account)
        run_dir = self._run_dir = Path(tempfile.mkdtemp(prefix="cenote-", dir=run_dir_place(account)))
        try:
            if account.switch:
                os.chown(run_dir, account.uid, account.gid)
            run_dir.chmod(0o711)  # other accounts may reach the socket, where they need the password
            self._janitor = Janitor(account, run_dir, self.data_dir, lock=lock)
        except BaseException:
            run_dir.rmdir()
            raise
        finally:
            if lock is not None:
                os.close(lock)
        self._finalizer = weakref.finalize(self, self._janitor.finish)
        if self._keep is None or not self.data_dir.exists():
            new_cluster(install, account, self.data_dir, cwd=run_dir)
        else:
            must_be_version(self.data_dir, self.version)
        for name, content in self._files.items():
            self._write(name, content)

    def _make_role_and_database(self) -> None:
        sql = set_up_sql(self.user, self.password, self.database, version=self.version)
        self.psql(sql, database=SUPERUSER)

    def _launch(self) -> None:
        """Start the postmaster, on another free port when somebody was faster and any port will do."""
        for attempts_left in reversed(range(_PORT_ATTEMPTS)):
            if self.port == 0:
                self.port = free_port()
            log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
            try:
                self._launch_once(log_start)
            except EmbeddedError:
                words = self.log()[log_start:]
                if not (self._any_port and attempts_left and "Address already in use" in words):
                    raise
                self.port = 0
            else:
                # Others have been told this port: a restart keeps it or fails.
                self._any_port = False
                return

    def _launch_once(self, log_start: int) -> None:
        assert self._janitor is not None
        self._write_settings()
        command = [str(self.binary("postgres")), "-D", str(self.data_dir)]
        with open(self.log_path, "ab") as log:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self._made(),
                    start_new_session=True,  # Ctrl-C in the terminal is for our process alone
                    **self._found().popen_args(),
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise EmbeddedError(f"cannot start {' '.join(command)}: {error}") from error
        self._janitor.server = process
        deadline = time.monotonic() + self._start_timeout_s
        while not self._is_ready(process.pid):
            problem = ""
            if process.poll() is not None:
                problem = f"exit status {process.returncode}"
            elif time.monotonic() > deadline:
                kill_tree(process.pid, timeout=5.0)
                process.wait()
                problem = f"not ready within {self._start_timeout_s:g} s"
            if problem:
                self._janitor.server = None
                tail = "\n".join(self.log()[log_start:].splitlines()[-_LOG_TAIL_LINES:])
                raise EmbeddedError(
                    f"PostgreSQL {self.version} did not start: {problem} of {' '.join(command)}\n{tail}\n"
                )
            time.sleep(_POLL_S)

    def _is_ready(self, pid: int) -> bool:
        # The eighth line of postmaster.pid is the server's state; pg_ctl waits for it in the same way.
        try:
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0].strip() == str(pid) and lines[7].strip() == "ready"

    def _write_settings(self) -> None:
        conf = postgresql_conf(self.settings, port=self.port, socket_dir=str(self.socket_dir), auth=self._auth)
        self._write("postgresql.conf", conf)
        self._write("pg_hba.conf", pg_hba_conf(self._hba, self._auth))
        account = self._found()
        self._write("pg_ident.conf", pg_ident_conf([account.name, "root"] if account.switch else [account.name]))

    def _write(self, name: str, content: bytes) -> None:
        """Put a file into the data directory, owned by the server's account, in one step."""
        account, path = self._found(), self.data_dir / name
        making = path.with_name(f".{path.name}.new")
        making.unlink(missing_ok=True)
        # The directory belongs to another account when we are root: never write through its links.
        descriptor = os.open(making, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "wb") as file:
            if account.switch:
                os.fchown(descriptor, account.uid, account.gid)
            file.write(content)
        making.replace(path)
