"""`cenote cost` on real servers: what it counts is what others count, and it leaves nothing behind."""

import asyncio
import http.server
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cenote import embedded
from cenote.errors import ConfigError, EmbeddedError, TargetUnusable
from cenote.measure.address import address_of
from cenote.measure.anatomy import Anatomy, Session
from cenote.measure.cost import Setup, run
from cenote.measure.cost_https import run_origin
from cenote.measure.cost_server import LocalServer
from cenote.measure.distance import DelayLine
from cenote.testing.faults import FaultProxy
from cenote.testing.postgres import DebianPostgres, TLSFiles, debian_bin_dir, make_tls_files, wait_until

pytestmark = [pytest.mark.pg, pytest.mark.interpreted]
COMMAND = [sys.executable, "-m", "cenote.cli", "cost"]


def cost(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False, timeout=120)


def dissected(dsn: str) -> Anatomy:
    with Session(address_of(dsn)) as session:
        session.anatomy.steps["first_query"] = session.query("SELECT 1")
        session.finish()
    return session.anatomy


def trips(seen: Anatomy) -> dict[str, int | None]:
    return {name: step.trips for name, step in seen.steps.items()}


def ours(server: embedded.Postgres) -> int:
    """Sessions of the command that are on the server now."""
    with psycopg.connect(server.superuser_dsn) as conn:
        row = conn.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cenote' AND pid <> pg_backend_pid()"
        ).fetchone()
    assert row is not None
    return int(row[0])


# -- a run through the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cost")


@pytest.fixture(scope="module")
def figures(folder: Path) -> dict[str, Any]:
    """The embedded server, near and at one distance, with all the files."""
    files = ["--plot", str(folder / "a.png"), "--report", str(folder / "a.html")]
    ended = cost("--samples", "4", "--rtt", "10ms", "--seconds", "1", "--json", *files)
    assert (ended.returncode, ended.stderr) == (0, "")
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


def phases(way: dict[str, Any]) -> dict[str, Any]:
    return {phase["name"]: phase for phase in way["phases"]}


def test_every_phase_is_there_with_its_round_trips(figures: dict[str, Any]) -> None:
    """By number: SYN; SSLRequest, refused; startup and SCRAM's first message; the proof; each query."""
    for way in (figures["near"], *figures["far"]):
        assert {name: phase["trips"] for name, phase in phases(way).items()} == {
            "tcp": 1,
            "first_answer": 1,
            "authentication": 2,
            "setup": 1,
            "parameters": 0,
            "first_query": 1,
            "warm_query": 1,
            "teardown": 0,
            "gone": 1,
        }
    assert figures["round_trips_to_ready"] == 5
    assert (figures["method"], figures["iterations"], figures["tls"]) == ("scram-sha-256", 4096, None)


def test_a_distance_is_really_waited_for_in_each_round_trip(figures: dict[str, Any]) -> None:
    (far,) = figures["far"]
    assert far["rtt_s"] == 0.01
    for phase in far["phases"]:
        if phase["name"] != "gone":  # its waiting begins with the teardown
            assert phase["seconds"]["p10"] >= phase["trips"] * 0.01
    assert far["ready"]["median"] >= 0.05


def test_the_server_was_measured_where_it_runs(figures: dict[str, Any]) -> None:
    cpu, memory = figures["server_cpu"], figures["memory"]
    assert 0 < cpu["warm_query"]["median"] < cpu["ready"]["median"] < 1
    assert 0 < cpu["per_connection_s"] < 1
    assert 2**18 < memory["idle"]["private"] < memory["idle"]["pss"] < 2**30
    assert memory["idle"]["private"] < memory["used"]["private"] < memory["used"]["pss"] < 2**30
    assert figures["direct"] is True
    assert 0 < figures["ports"]["client"] + figures["ports"]["server"] <= 4


def test_the_password_is_not_in_what_is_written(figures: dict[str, Any]) -> None:
    assert "dsn" not in figures["target"]
    assert "postgresql://" not in json.dumps(figures)


def test_the_picture_and_the_page_are_written(figures: dict[str, Any], folder: Path) -> None:
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    page = (folder / "a.html").read_text()
    assert page.count("</svg>") == 2
    assert "server set-up" in page


def test_piped_the_table_is_plain_and_narrow_enough(pg18: embedded.Postgres, folder: Path) -> None:
    drawing = folder / "b.svg"
    ended = cost(pg18.dsn, "--samples", "1", "--seconds", "0.1", "--plot", str(drawing))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "\x1b" not in ended.stdout
    assert pg18.password not in ended.stdout
    assert "authentication" in ended.stdout
    assert "a pool saves" in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 120
    assert "</svg>" in drawing.read_text()
    wait_until(lambda: ours(pg18) == 0)


# -- what others count ------------------------------------------------------------------------------------------


def test_the_bytes_are_those_that_a_forwarder_between_passes_on(pg18: embedded.Postgres) -> None:
    address = address_of(pg18.dsn)

    async def through() -> tuple[Anatomy, int, int]:
        async with FaultProxy(pg18.host, pg18.port) as proxy:
            there = replace(address, sockaddr=(proxy.host, proxy.port), family=socket.AF_INET)

            def dissect() -> Anatomy:
                with Session(there) as session:
                    session.anatomy.steps["first_query"] = session.query("SELECT repeat('x', 100000)")
                    session.finish()
                return session.anatomy

            seen = await asyncio.to_thread(dissect)
            await asyncio.gather(*(task for task in asyncio.all_tasks() if task.get_name().startswith("link")))
            return seen, proxy.total["up"].passed, proxy.total["down"].passed

    seen, up, down = asyncio.run(through())
    assert sum(step.up for step in seen.steps.values()) == up
    assert sum(step.down for step in seen.steps.values()) == down
    assert seen.steps["first_query"].down > 100_000


def test_the_reported_settings_have_the_bytes_of_their_messages(pg18: embedded.Postgres) -> None:
    seen = dissected(pg18.dsn)
    with psycopg.connect(pg18.dsn, application_name="cenote") as conn:
        names = [
            *("application_name", "client_encoding", "DateStyle", "default_transaction_read_only"),
            *("in_hot_standby", "integer_datetimes", "IntervalStyle", "is_superuser", "scram_iterations"),
            *("search_path", "server_encoding", "server_version", "session_authorization"),
            *("standard_conforming_strings", "TimeZone"),
        ]
        values = {name: conn.info.parameter_status(name) for name in names}
    reported = sum(len(name) + len(value) + 2 + 5 for name, value in values.items() if value is not None)
    assert seen.parameters == sum(value is not None for value in values.values())
    assert seen.steps["parameters"].down == reported + 13 + 6  # BackendKeyData, ReadyForQuery


def test_memory_is_what_smaps_rollup_says(pg18: embedded.Postgres) -> None:
    with psycopg.connect(pg18.dsn) as conn:
        backend = conn.info.backend_pid
        rollup = Path(f"/proc/{backend}/smaps_rollup")
        lines: list[str] = []
        while lines != rollup.read_text().splitlines():  # whoever ends meanwhile no longer shares with it
            lines = rollup.read_text().splitlines()
            seen = LocalServer(pg18.pid, pg18.port).footprint(backend)
    by_hand = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    assert seen.private == by_hand["Private_Clean:"] + by_hand["Private_Dirty:"]
    assert seen.pss is not None
    assert abs(seen.pss - by_hand["Pss:"]) < 2**20  # other backends come and go, and share


def test_a_process_that_is_not_the_servers_has_no_figures(pg18: embedded.Postgres) -> None:
    local = LocalServer(pg18.pid, pg18.port)
    assert not local.owns(os.getpid())
    assert local.backend_cpu_s(os.getpid()) is None
    assert local.footprint(os.getpid()).pss is None


# -- ways to log in ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("auth", "method", "expected"),
    [("trust", "trust", None), ("md5", "md5", 1), ("password", "password", 1)],
)
def test_each_method_is_named_and_has_its_round_trips(auth: Any, method: str, expected: int | None) -> None:
    with embedded.Postgres(16, auth="trust", hba=[f"host all all 127.0.0.1/32 {auth}"]) as server:
        if auth == "md5":
            server.psql(f"SET password_encryption = 'md5'; ALTER ROLE app PASSWORD '{server.password}'")
        seen = dissected(server.dsn)
    assert seen.method == method
    assert trips(seen).get("authentication") == expected
    assert trips(seen)["setup"] == 1


def test_a_unix_socket_has_neither_dns_nor_tcp_nor_a_distance(pg18: embedded.Postgres) -> None:
    result = run(pg18.socket_dsn, Setup(samples=1, seconds=0.1))
    assert result.unix
    assert result.near.phase("tcp") is None
    assert result.near.phase("dns") is None
    assert result.near.trips == 3
    assert result.ports is None
    with pytest.raises(ConfigError, match="a Unix socket has no distance"):
        run(pg18.socket_dsn, Setup(rtts=(0.01,)))


def test_a_name_is_looked_up_and_refused_tls_is_not_asked_for_with_disable(pg18: embedded.Postgres) -> None:
    seen = dissected(pg18.dsn.replace(pg18.host, "localhost") + "?sslmode=disable")
    assert seen.steps["dns"].trips is None
    # Now the startup packet is the first that is said, and asking for SCRAM its answer.
    assert trips(seen)["first_answer"] == 1
    assert trips(seen)["authentication"] == 1


@pytest.fixture(scope="module")
def debian() -> Iterator[DebianPostgres]:
    try:
        debian_bin_dir()
    except EmbeddedError as error:
        pytest.skip(str(error))
    with DebianPostgres() as server:
        yield server


@pytest.mark.debian_pg
def test_tls_is_dissected_too_and_is_never_resumed(debian: DebianPostgres) -> None:
    address = address_of(debian.tls_dsn(channel_binding="require"))
    with Session(address) as first:
        first.query("SELECT 1")
        first.finish()
    with Session(address, resume=first.tls_session) as second:
        second.finish()
    seen = second.anatomy
    assert seen.tls is not None
    assert (seen.tls.version, seen.tls.resumed, seen.tls.ticket) == ("TLSv1.3", False, False)
    assert seen.method == "scram-sha-256-plus"
    # Debian's server wants prime256v1, and OpenSSL sends a key share for another curve first.
    assert trips(seen)["tls"] in (1, 2)
    assert seen.steps["tls"].down > 500


@pytest.mark.debian_pg
def test_over_tls_the_whole_command_works_and_finds_no_port_waiting(debian: DebianPostgres) -> None:
    result = run(debian.tls_dsn(), Setup(samples=2, rtts=(0.002,), seconds=0.2))
    assert result.resumed is False
    assert result.far[0].ready.median >= result.far[0].trips * 0.002
    assert result.ports is not None
    assert (result.ports.client, result.ports.server) == (0, 0)
    wait_until(lambda: ours(debian) == 0)


@pytest.mark.debian_pg
def test_a_superuser_is_told_what_the_backend_allocated(debian: DebianPostgres) -> None:
    memory = run(debian.superuser_dsn, Setup(samples=1, seconds=0.1)).memory
    assert memory.allocated_idle is not None
    assert memory.allocated_used is not None
    assert 2**18 < memory.allocated_idle < memory.allocated_used
    assert memory.used.private is not None
    assert memory.allocated_used < memory.used.private


def test_before_a_pooler_its_own_cost_is_measured_and_no_backend_is_taken_for_ours(
    pg18: embedded.Postgres,
) -> None:
    words = [sys.executable, "-m", "cenote.cli", "serve", pg18.dsn, "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stderr is not None
        started = next(line for line in daemon.stderr if "listening=" in line)
        port = int(started.split("listening=127.0.0.1:")[1].split()[0])
        try:
            result = run(pg18.dsn.replace(f":{pg18.port}/", f":{port}/"), Setup(samples=2))
        finally:
            daemon.terminate()
            daemon.communicate(timeout=20)
    assert not result.direct
    assert not result.local
    assert (result.server_cpu, result.memory.idle.pss, result.memory.allocated_idle) == (None, None, None)
    assert result.near.trips == 5


# -- bad input --------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_one_clear_message() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ended = cost(f"postgresql://app@127.0.0.1:{port}/app")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert len(ended.stderr.splitlines()) == 1
    assert "cannot measure this server" in ended.stderr


def test_a_wrong_password_is_one_clear_message(pg18: embedded.Postgres) -> None:
    ended = cost(pg18.dsn_for(password="wrong"))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert len(ended.stderr.splitlines()) == 1
    assert "password authentication failed" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_all_that_is_wrong_with_the_words_is_said_at_once() -> None:
    ended = cost("--samples", "0", "--rate", "0", "--rtt", "90s", "--sql", " ")
    assert ended.returncode == 2
    assert [line.split()[1] for line in ended.stderr.splitlines()] == ["samples", "rate", "rtt", "sql:"]
    ended = cost("--rtt", "20,1h,5ms")
    assert ended.returncode == 2
    assert [line.split("'")[1] for line in ended.stderr.splitlines()] == ["20", "1h"]
    ended = cost("--rtt", ",")
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_standard_output_is_said_in_one_line(pg18: embedded.Postgres) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "cenote.cli", "cost", pg18.dsn, "--samples", "1", "--seconds", "0.1", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert ended.returncode == 1
    assert ended.stderr == "cenote: No space left on device: what was found could not be written\n"


def test_the_last_slots_are_left_alone() -> None:
    with embedded.Postgres(settings={"max_connections": 6}) as server:
        with psycopg.connect(server.dsn), pytest.raises(TargetUnusable, match="needs 2 connections"):
            run(server.dsn, Setup(samples=1))


def test_a_role_that_may_only_read_is_enough(pg18: embedded.Postgres) -> None:
    dsn = pg18.dsn + "?options=-c%20default_transaction_read_only%3Don"
    result = run(dsn, Setup(samples=1, seconds=0.1))
    assert result.near.samples == 1


def test_a_query_that_fails_is_told_in_the_servers_words(pg18: embedded.Postgres) -> None:
    with pytest.raises(TargetUnusable, match=r"query: the server says: .*nothing_like_it.* \(42P01\)"):
        run(pg18.dsn, Setup(sql="SELECT * FROM nothing_like_it"))
    wait_until(lambda: ours(pg18) == 0)


def test_a_server_that_dies_half_way_is_one_clear_message() -> None:
    with embedded.Postgres() as server:

        def kill(stage: str, done: int, total: int) -> None:
            if stage == "near" and done == 2:
                server.kill()

        with pytest.raises(TargetUnusable, match="cannot measure this server: connecting: Connection refused"):
            run(server.dsn, Setup(samples=5), kill)
        server.restart()
        with Session(address_of(server.dsn)) as session:
            server.kill()
            with pytest.raises(TargetUnusable, match="cannot measure this server: query: "):
                session.query("SELECT 1")


def test_interrupted_in_a_long_query_it_ends_and_so_does_the_query(pg18: embedded.Postgres) -> None:
    words = [*COMMAND, pg18.dsn, "--sql", "SELECT pg_sleep(100)"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: ours(pg18) == 1 and _sleeps(pg18), timeout=20, what="the query runs")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "cenote: interrupted\n")
    wait_until(lambda: ours(pg18) == 0, what="nothing is left on the server")


def _sleeps(server: embedded.Postgres) -> bool:
    return server.psql("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'").strip() == "1"


def test_a_part_is_over_when_its_seconds_are(pg18: embedded.Postgres) -> None:
    """It has one sample at least."""
    result = run(pg18.dsn, Setup(samples=1000, seconds=0.01, rtts=(0.02,)))
    assert [way.samples for way in result.far] == [1]


# -- the line ---------------------------------------------------------------------------------------------------


def test_a_line_passes_everything_on_in_its_order_after_its_time(pg18: embedded.Postgres) -> None:
    address = address_of(pg18.dsn)
    before = set(threading.enumerate())
    with DelayLine(address.family, address.sockaddr, 0.004) as line:
        with Session(address, far=line.sockaddr) as session:
            value = session.value("SELECT string_agg(n::text, ',') FROM generate_series(1, 50000) n")
            session.finish()
    assert value == ",".join(map(str, range(1, 50_001)))
    assert not set(threading.enumerate()) - before, "a closed line has no threads"


def test_through_a_line_to_nowhere_the_connection_ends() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        nowhere = listener.getsockname()
    with DelayLine(socket.AF_INET, nowhere, 0.001) as line, socket.create_connection(line.sockaddr) as client:
        client.settimeout(10)
        client.sendall(b"\0")
        try:
            answer = client.recv(1)
        except ConnectionResetError:
            answer = b""
        assert answer == b""


# -- HTTPS ------------------------------------------------------------------------------------------------------


@contextmanager
def origin(files: TLSFiles | None, protocol: str) -> Iterator[str]:
    """A web server on loopback; the URL of a page of 1000 bytes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = protocol
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 1000)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        if files is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(files.server_certificate, files.server_key)
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"{'https' if files else 'http'}://localhost:{server.server_address[1]}/page?a=1"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> TLSFiles:
    return make_tls_files(tmp_path_factory.mktemp("tls"))


def test_an_https_origin_is_dissected_and_its_tickets_are_used(certificates: TLSFiles, folder: Path) -> None:
    with origin(certificates, "HTTP/1.1") as url:
        words = ["--samples", "3", "--rtt", "4ms", "--tls-ca", str(certificates.ca), "--json"]
        ended = cost(url, *words, "--plot", str(folder / "c.png"), "--report", str(folder / "c.html"))
    assert (ended.returncode, ended.stderr) == (0, "")
    figures = json.loads(ended.stdout)
    for way in (figures["near"], *figures["far"]):
        assert {name: phase["trips"] for name, phase in phases(way).items()} == {
            "dns": None,
            "tcp": 1,
            "tls": 1,
            "first_request": 1,
            "reused_request": 1,
            "teardown": 0,
        }
    assert phases(figures["far"][0])["tls"]["seconds"]["p10"] >= 0.004
    assert phases(figures["near"])["first_request"]["down"] > 1000
    assert (figures["status"], figures["body_bytes"]) == (200, 1000)
    assert figures["tls"]["ticket"] is True
    assert figures["resumed"]["samples"] == 3


def test_an_origin_that_closes_each_time_has_nothing_to_reuse(folder: Path) -> None:
    with origin(None, "HTTP/1.0") as url:
        result = run_origin(url, Setup(samples=2))
        ended = cost(url, "--samples", "1", "--plot", str(folder / "d.svg"))
    assert result.near.warm is None
    assert result.tls is None
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "closes after each answer" in ended.stdout


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda url: (url, None), "TLS: its certificate does not pass: .*--tls-ca FILE"),
        (lambda url: (url.replace("https", "http"), None), "first request"),
        (lambda url: ("https://localhost:1/", None), "connecting: localhost:1: Connection refused"),
        (lambda url: ("https://nowhere.invalid/", None), "looking up the name"),
    ],
)
def test_an_origin_that_cannot_be_measured_is_one_clear_message(
    certificates: TLSFiles, make: Callable[[str], tuple[str, str | None]], said: str
) -> None:
    with origin(certificates, "HTTP/1.1") as url:
        given, ca = make(url)
        with pytest.raises(TargetUnusable, match=f"cannot measure this origin: {said}"):
            run_origin(given, Setup(samples=1), ca=ca)


def test_what_is_no_origins_url_is_wrong_use(folder: Path) -> None:
    ended = cost("https://user@/", "--tls-ca", str(folder / "missing.pem"))
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 3
    ended = cost("postgresql://localhost/", "--tls-ca", "x")
    assert ended.returncode == 2
    assert "sslrootcert" in ended.stderr
