"""The janitor: a tiny process that outlives its owner only to clean up after it.

It holds the read end of a pipe whose write end only the owner has. When the owner closes the pipe or
dies, by whatever signal, the kernel ends the pipe, and the janitor stops the server and removes what is
left. It is a shell script and not Python because it starts in a millisecond, takes a megabyte, and can
run as an account that cannot read our interpreter. It never acts while its owner lives.
"""

import os
import shutil
import signal
import subprocess
import time
import weakref
from pathlib import Path

from cenote.embedded.install import Account
from cenote.errors import EmbeddedError

# Every process of a server runs inside one of the two directories (the postmaster moves to its data
# directory, cp and initdb are started there), so on Linux /proc names them all exactly, without the doubt
# of a remembered process id. Elsewhere the postmaster's own file has to do.
_SCRIPT = r"""
trap '' INT TERM HUP QUIT
run=$1 data=$2
while read -r _; do :; done

pid= shm=
if [ -f "$data/postmaster.pid" ]; then
    { read -r pid; read -r _; read -r _; read -r _; read -r _; read -r _; read -r _ shm; } \
        <"$data/postmaster.pid"
fi
ours() {
    if [ -d /proc/self ]; then
        ls -l /proc/[0-9]*/cwd 2>/dev/null | while read -r line; do
            case $line in
            *" -> $run"|*" -> $run/"*|*" -> $data"|*" -> $data/"*)
                line=${line%%/cwd -> *}; echo "${line##*/}";;
            esac
        done
    elif [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; then
        echo "$pid"
    fi
}
left=$(ours)
tries=0
if [ -n "$left" ]; then
    case " $(echo $left) " in
    *" $pid "*) kill -QUIT "$pid";;
    *) tries=200;;
    esac
fi
while [ -n "$left" ] && [ "$tries" -lt 400 ]; do
    [ "$tries" -lt 200 ] || kill -KILL $left 2>/dev/null
    tries=$((tries + 1))
    sleep 0.02
    left=$(ours)
done
# A crashed postmaster leaves a System V segment of 56 bytes, its lock on the data directory.
if [ -n "$shm" ] && [ -f "$data/postmaster.pid" ]; then ipcrm -m "$shm" 2>/dev/null; fi
rm -rf "$run"
"""


class Janitor:
    """Watches over one run directory until `finish`, or until this process is gone.

    run_dir: removed at the end, with all in it. data_dir: where the server's processes run; inside
    `run_dir` unless the data is to stay. lock: a locked descriptor that the janitor inherits, so that the
    lock lasts exactly as long as the janitor does.

    Raises `EmbeddedError` when it cannot be started.
    """

    def __init__(self, account: Account, run_dir: Path, data_dir: Path, *, lock: int | None = None) -> None:
        self._run_dir = run_dir
        read_end, self._write_end = os.pipe()
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _SCRIPT, "cenote-janitor", str(run_dir), str(data_dir)],
                stdin=read_end,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                pass_fds=() if lock is None else (lock,),
                start_new_session=True,  # Ctrl-C in the terminal is for the owner alone
                **account.popen_args(),
            )
        except (OSError, subprocess.SubprocessError) as error:
            os.close(self._write_end)
            raise EmbeddedError(f"cannot start /bin/sh as {account.name!r}: {error}") from error
        finally:
            os.close(read_end)
        self.server: subprocess.Popen[bytes] | None = None
        """The postmaster, while there is one: our own child, so that its exit is ours to collect."""
        self._owner_pid = os.getpid()
        _living.add(self)

    def finish(self) -> None:
        """Let the janitor stop the server and remove the run directory; wait for it.

        Calling it again, or in a forked child, does nothing.
        """
        if self._write_end < 0 or os.getpid() != self._owner_pid:
            return
        self._close_pipe()
        _living.discard(self)
        while self._process.poll() is None:
            if self.server is not None:
                self.server.poll()  # without /proc the janitor takes an uncollected server for a living one
            time.sleep(0.002)
        # Judged by what is left, not by its exit status: somebody else may have collected that.
        if self._run_dir.exists():
            self._do_its_work()

    def _do_its_work(self) -> None:
        """Clean up in place of a janitor that somebody killed."""
        if self.server is not None and self.server.poll() is None:
            kill_tree(self.server.pid, timeout=5.0)
            self.server.wait()
        shutil.rmtree(self._run_dir, ignore_errors=True)

    def _close_pipe(self) -> None:
        os.close(self._write_end)
        self._write_end = -1

    def _after_fork_in_child(self) -> None:
        # The child shares the pipe: as long as it held it too, the owner's death would go unnoticed. The
        # processes are not its children: marked as ended, or `Popen` would warn about them.
        if self._write_end >= 0:
            self._close_pipe()
        for process in (self._process, self.server):
            if process is not None and process.returncode is None:
                process.returncode = 0


def kill_tree(pid: int, *, timeout: float) -> None:
    """SIGKILL a postmaster and its children, and wait until the children are gone.

    The caller, whose child the postmaster is, collects the postmaster itself. Where there is no /proc only
    the postmaster is killed; its children notice that by themselves.
    """
    try:
        os.kill(pid, signal.SIGSTOP)  # a stopped postmaster starts no more children
        children = _children(pid)
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
    deadline = time.monotonic() + timeout
    while any(_is_running(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.002)


def _children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        fields = _stat_fields(path)
        if fields and fields[1] == str(pid):
            found.append(int(path.parent.name))
    return found


def _is_running(pid: int) -> bool:
    fields = _stat_fields(Path(f"/proc/{pid}/stat"))
    return bool(fields) and fields[0] not in "ZX"


def _stat_fields(path: Path) -> list[str]:
    """Return the state, the parent and so on of /proc/PID/stat; empty when the process is gone."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the name before it may hold anything


_living: "weakref.WeakSet[Janitor]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for janitor in list(_living):
        janitor._after_fork_in_child()
    _living.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
