"""Data directories: initdb once, copy for every server, lock those that stay.

initdb takes most of a second, a copy a tenth of one. A template is made in a directory of its own and
renamed when it is whole, so a half-made one is never used. This file knows nothing of servers: it makes
directories and copies them, always as the account that will run the server, so that root never walks a
tree that another account can change.
"""

import fcntl
import hashlib
import os
import shutil
import time
from pathlib import Path

from cenote.embedded.configuration import SUPERUSER
from cenote.embedded.install import Account, Install, cache_dir, cache_lock, making_dir
from cenote.errors import EmbeddedError

_INITDB = (
    f"--username={SUPERUSER}",
    "--encoding=UTF8",
    "--no-locale",  # the same order of strings on every machine
    "--auth=reject",  # pg_hba.conf is written anew for every server
    "--no-sync",
    "--no-instructions",
)
_LOCK = "lock"
_LOCK_PATIENCE_S = 10.0
_UNUSED_AFTER_S = 30 * 24 * 3600.0


def new_cluster(install: Install, account: Account, target: Path, *, cwd: Path) -> None:
    """Make `target`, which must not exist, a fresh data directory owned by `account`."""
    template = _template(install, account)
    making = target.with_name(f"{target.name}.new")
    account.run(["rm", "-rf", making], cwd=cwd, what="remove a half-made copy")
    # Copied, never hard-linked: the server writes into its files. GNU's cp clones where the file system can.
    account.run(["cp", "-R", template, making], cwd=cwd, what="copy the template cluster")
    account.run(["mv", making, target], cwd=cwd, what="name the new cluster")


def lock_kept(folder: Path, account: Account) -> int:
    """Make `folder` ready to hold a cluster that stays, and return a descriptor that locks it.

    Waits up to 10 seconds for the janitor of an owner that has just died. Raises `EmbeddedError` when the
    folder is in use, holds something else, or is not ours to use.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        strangers = {path.name for path in folder.iterdir()} - {_LOCK, "data", "data.new"}
        if strangers:
            raise EmbeddedError(f"cannot keep a cluster in {folder}: it already holds {min(strangers)!r}")
        if account.switch:
            os.chown(folder, account.uid, account.gid)
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise EmbeddedError(f"cannot keep a cluster in {folder}: {error}") from error
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise EmbeddedError(f"the cluster in {folder} is in use by another process") from None
            time.sleep(0.02)
        else:
            return descriptor


def must_be_version(data_dir: Path, version: int) -> None:
    """Raise `EmbeddedError` unless the kept cluster belongs to this major version."""
    found = (data_dir / "PG_VERSION").read_text().strip()
    if found != str(version):
        raise EmbeddedError(f"the cluster kept in {data_dir} is of PostgreSQL {found}, not {version}")


def _template(install: Install, account: Account) -> Path:
    recipe = hashlib.sha256(repr(_INITDB).encode()).hexdigest()[:8]
    cache = cache_dir()
    whole = cache / f"template-{install.key}-{account.uid}-{recipe}"
    if not whole.exists():
        with cache_lock(cache):
            if not whole.exists():
                _prune(cache)
                making = making_dir(cache)
                os.chown(making, account.uid, account.gid)
                initdb = [str(install.bin_dir / "initdb"), "-D", str(making / "data")]
                account.run([*initdb, *_INITDB], cwd=making, what="initialise a cluster")
                making.rename(whole)
    os.utime(whole)
    return whole / "data"


def _prune(cache: Path) -> None:
    """Remove what no server has been copied from for a month. Called with the cache's lock held."""
    oldest = time.time() - _UNUSED_AFTER_S
    for path in cache.glob("template-*"):
        if path.stat().st_mtime < oldest:
            shutil.rmtree(path, ignore_errors=True)
