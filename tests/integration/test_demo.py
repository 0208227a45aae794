"""The demonstration on a real server, and what its figures are made of."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from cenote import embedded
from cenote.errors import CenoteError
from cenote.measure.demo import SERVERLESS, WAYS, Result, Sample, Setup, Side, percentile
from cenote.measure.findings import as_dict, conclusion, duration, percent, times
from cenote.measure.proc import ServerProcesses, process_cpu_s, process_memory_bytes
from cenote.measure.served import served

pytestmark = pytest.mark.pg
COMMAND = [sys.executable, "-m", "cenote.cli", "demo"]


def eventually(condition: Callable[[], Any], within_s: float = 20.0) -> Any:
    """What `condition` gives as soon as it is true of the world outside this process."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)
    return value


# -- a run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "picture.png"


@pytest.fixture(scope="module")
def figures(picture: Path) -> dict[str, Any]:
    """A small run through the command line: more callers than the server lets in."""
    words = ["--clients", "60", "--requests", "2", "--every", "0.3", "--pool-size", "3", "--max-connections", "12"]
    words += ["--serverless", "50"]
    ended = subprocess.run(
        [*COMMAND, *words, "--json", "--plot", str(picture)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


@pytest.mark.parametrize("way", [*WAYS, *SERVERLESS])
def test_every_request_is_accounted_for_exactly_once(figures: dict[str, Any], way: str) -> None:
    side = figures[way]
    assert side["requests"] == (50 if way in SERVERLESS else 120)
    assert side["answered"] + side["refused"] + side["failed"] + side["unfinished"] == side["requests"]
    assert side["refused"] == sum(side["refused_by"].values())
    assert side["failed_by"] == {}
    assert side["unfinished"] == 0


def test_a_connection_for_each_request_meets_the_limit_of_the_server(figures: dict[str, Any]) -> None:
    side = figures["direct"]
    assert side["answered"] > 0
    assert side["refused_by"].keys() == {"too_many_connections"}
    assert side["opened"] == side["answered"]


def test_the_pool_answers_everybody_through_its_few_connections(figures: dict[str, Any]) -> None:
    side = figures["pool"]
    assert side["answered"] == 120
    assert 1 <= side["opened"] <= 3
    assert 1 <= side["peak_backends"] <= 3
    assert all(sample["backends"] <= 3 for sample in side["samples"])


@pytest.mark.parametrize("way", ["proxy", "serverless_proxy"])
def test_the_proxy_answers_everybody_and_what_it_costs_itself_is_known(figures: dict[str, Any], way: str) -> None:
    side = figures[way]
    assert side["answered"] == side["requests"]
    assert 1 <= side["opened"] <= 3
    assert all(sample["backends"] <= 3 for sample in side["samples"])
    assert 0 < side["proxy_cpu_s"] < 60
    assert side["proxy_cpu_per_answer_s"] == pytest.approx(side["proxy_cpu_s"] / side["answered"])
    assert 2**23 < side["proxy_memory_bytes"] < 2**30


def test_where_there_is_no_proxy_none_is_measured(figures: dict[str, Any]) -> None:
    for way in ("direct", "pool", "serverless_direct"):
        assert figures[way]["proxy_cpu_s"] is None
        assert figures[way]["proxy_memory_bytes"] is None


def test_short_lived_tasks_meet_the_limit_of_the_server_without_the_proxy(figures: dict[str, Any]) -> None:
    side = figures["serverless_direct"]
    assert side["refused_by"].keys() <= {"too_many_connections"}
    assert side["opened"] == side["answered"]


@pytest.mark.parametrize("way", [*WAYS, *SERVERLESS])
def test_the_server_was_measured_from_outside(figures: dict[str, Any], way: str) -> None:
    side = figures[way]
    one_by_one = way == "serverless_direct"  # a look may meet nobody, or one that was just forked
    assert side["peak_backends"] >= (0 if one_by_one else 1)
    assert (0 if one_by_one else 2**20) <= side["peak_memory_bytes"] < 2**30
    assert 0 < side["server_cpu_s"] < 60
    assert side["server_cpu_per_answer_s"] == pytest.approx(side["server_cpu_s"] / side["answered"])
    assert side["time_wait"] >= side["opened"]


@pytest.mark.parametrize("way", [*WAYS, *SERVERLESS])
def test_latencies_are_ordered_and_within_the_run(figures: dict[str, Any], way: str) -> None:
    side = figures[way]
    latency = list(side["latency_s"].values())
    assert latency[0] > 0
    assert latency == sorted(latency)
    assert latency[-1] <= side["seconds"]


def test_the_json_tells_what_was_asked_where_and_what_follows(figures: dict[str, Any]) -> None:
    assert figures["setup"]["clients"] == 60
    assert figures["setup"]["max_connections"] == 12
    assert figures["machine"]["postgres"] == 18
    assert figures["conclusion"].startswith("With a connection for each request, ")


def test_the_picture_is_a_png_with_something_in_it(figures: dict[str, Any], picture: Path) -> None:
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert (width, height) == (1430, 1066)
    assert len(data) > 30_000


def test_piped_the_table_is_plain_and_the_svg_is_drawn(tmp_path: Path) -> None:
    drawing = tmp_path / "picture.svg"
    words = ["--clients", "5", "--requests", "1", "--pool-size", "1", "--postgres", "16", "--plot", str(drawing)]
    words += ["--serverless", "0"]
    ended = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "\x1b" not in ended.stdout
    assert "PostgreSQL 16" in ended.stdout
    assert "server connections opened" in ended.stdout
    assert "the proxy's own CPU" in ended.stdout
    assert "short-lived" not in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 110
    assert "</svg>" in drawing.read_text()


def test_what_the_bound_cuts_off_is_counted_as_unfinished() -> None:
    words = ["--clients", "200", "--requests", "1", "--seconds", "0.05", "--serverless", "0", "--json"]
    ended = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0
    side = json.loads(ended.stdout)["direct"]
    assert side["unfinished"] > 0
    assert side["answered"] + side["refused"] + side["failed"] + side["unfinished"] == 200


def test_interrupted_it_ends_with_130_and_leaves_no_process_behind() -> None:
    words = ["--clients", "20", "--requests", "20", "--seconds", "50"]
    with subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        demo = psutil.Process(process.pid)

        def family() -> list[psutil.Process]:
            return demo.children(recursive=True)

        def at_work() -> bool:
            try:
                return any("cenote.measure.callers" in child.cmdline() for child in family())
            except psutil.Error:
                return False

        eventually(at_work)
        children = family()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (out, err) == ("", "cenote: interrupted\n")
    assert len(children) >= 3
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


# -- what /proc says --------------------------------------------------------------------------------------------


def test_backends_their_memory_and_their_cpu_are_those_of_the_server() -> None:
    with embedded.Postgres(settings={"autovacuum": False}) as server:
        processes = ServerProcesses(server.pid, server.port)
        assert (processes.backends().number, processes.time_wait()) == (0, 0)
        before = processes.cpu_s()
        conns = [psycopg.connect(server.dsn, autocommit=True) for _ in range(3)]
        seen = processes.backends()
        assert seen.number == 3
        assert seen.memory_bytes is not None
        assert 3 * 2**18 < seen.memory_bytes < 3 * 2**27
        conns[0].execute("SELECT count(*) FROM generate_series(1, 1000000)")
        busy = processes.cpu_s()
        assert before is not None
        assert busy is not None
        assert busy >= before + 0.02
        for conn in conns:
            conn.close()
        eventually(lambda: processes.backends().number == 0)
        after = processes.cpu_s()
        assert after is not None
        assert after >= busy - 0.05, "the time of an ended backend is kept in its parent's account"
        eventually(lambda: processes.time_wait() == 3)


def test_of_a_server_that_is_gone_nothing_is_known() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    processes = ServerProcesses(process.pid, 1)
    assert processes.backends().number is None
    assert processes.cpu_s() is None
    assert process_cpu_s(process.pid) is None
    assert process_memory_bytes(process.pid) is None


# -- the proxy --------------------------------------------------------------------------------------------------


def test_the_proxy_pools_the_server_and_is_gone_with_its_block(pg18: embedded.Postgres) -> None:
    with served(pg18, size=1, clients=2) as proxy:
        pids = []
        for _ in range(2):
            with psycopg.connect(proxy.dsn, autocommit=True) as conn:
                pids.append(conn.execute("SELECT pg_backend_pid()").fetchone())
        assert pids[0] == pids[1]
        daemon = psutil.Process(proxy.pid)
    assert not daemon.is_running()
    with pytest.raises(KeyboardInterrupt):
        with served(pg18, size=1, clients=2) as proxy:
            daemon = psutil.Process(proxy.pid)
            raise KeyboardInterrupt
    assert not daemon.is_running()


def test_the_proxy_ends_when_whoever_started_it_was_killed(pg18: embedded.Postgres) -> None:
    script = (
        "import sys\nfrom types import SimpleNamespace\nfrom cenote.measure.served import served\n"
        f"server = SimpleNamespace(host='127.0.0.1', port={pg18.port}, user='app', database='app',\n"
        f"    password={pg18.password!r}, dsn={pg18.dsn!r})\n"
        "with served(server, size=1, clients=2) as proxy:\n"
        "    print(proxy.pid, flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        daemon = psutil.Process(int(process.stdout.readline()))
        process.kill()
    eventually(lambda: not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE)


def test_a_proxy_that_cannot_start_says_why(pg18: embedded.Postgres) -> None:
    with pytest.raises(CenoteError, match=r"the proxy did not start: .*max_size = 0"):
        with served(pg18, size=0, clients=2):
            pass


# -- what the figures say ---------------------------------------------------------------------------------------

SIDE = Side(
    way="direct",
    requests=100,
    answered=4,
    refused=96,
    failed=0,
    unfinished=0,
    refused_by={"too_many_connections": 96},
    failed_by={},
    latencies_s=(0.1, 0.2, 0.3, 2.0),
    seconds=2.0,
    opened=4,
    peak_backends=40,
    peak_memory_bytes=40 << 20,
    server_cpu_s=4.0,
    callers_cpu_s=1.0,
    sampling_cpu_s=0.0,
    time_wait=100,
    samples=(Sample(0.0, 40, 40 << 20),),
)
POOL = replace(
    SIDE,
    way="pool",
    answered=100,
    refused=0,
    refused_by={},
    latencies_s=(0.01,) * 100,
    opened=2,
    peak_backends=2,
    peak_memory_bytes=41 << 20,
    server_cpu_s=10.0,
)
PROXY = replace(POOL, way="proxy", opened=4, server_cpu_s=20.0, proxy_cpu_s=1.0, proxy_memory_bytes=40 << 20)
SETUP = Setup(clients=100, requests=1, pool_size=2)


def test_the_conclusion_is_made_of_the_figures() -> None:
    serverless = (replace(SIDE, way="serverless_direct"), replace(PROXY, way="serverless_proxy"))
    assert conclusion(Result(SETUP, {}, SIDE, POOL, PROXY, serverless)) == (
        "With a connection for each request, 4 of 100 requests were answered (96 refused), "
        "half of them within 200 ms. "
        "Through a pool of 2, all 100 requests were answered, half of them within 10 ms. "
        "Through a proxy with 2, all 100 requests were answered, half of them within 10 ms. "
        "The pool needed 1/2.0 of the server connections, 1/20 of the backends at the peak, "
        "about the same backend memory and 1/10 of the server CPU per answer. "
        "The proxy needed about the same server connections, 1/20 of the backends at the peak, "
        "about the same backend memory and 1/5.0 of the server CPU per answer. "
        "When short-lived tasks connect once each, 4 of 100 tasks were answered (96 refused), "
        "half of them within 200 ms. "
        "When they connect to the proxy, all 100 tasks were answered, half of them within 10 ms."
    )


def test_the_conclusion_does_not_flatter_a_pool_that_does_worse() -> None:
    slow = replace(POOL, answered=50, unfinished=50, latencies_s=(5.0,) * 50, opened=8, server_cpu_s=100.0)
    said = conclusion(Result(SETUP, {}, SIDE, slow, PROXY))
    assert "50 of 100 requests were answered (50 not finished), half of them within 5.00 s" in said
    assert "2.0 times the server connections" in said
    assert "2.0 times the server CPU per answer" in said


def test_what_was_not_measured_is_left_out_of_the_conclusion() -> None:
    blind = [
        replace(side, peak_backends=None, peak_memory_bytes=None, server_cpu_s=None)
        for side in (SIDE, POOL, PROXY)
    ]
    said = conclusion(Result(SETUP, {}, *blind))
    assert "The pool needed 1/2.0 of the server connections. The proxy needed about the same server con" in said


def test_a_side_without_answers_has_no_latency_and_no_price_of_an_answer() -> None:
    none = replace(SIDE, answered=0, refused=100, latencies_s=())
    assert as_dict(Result(SETUP, {}, none, POOL, PROXY))["direct"]["latency_s"]["p50"] is None
    assert none.server_cpu_per_answer_s is None
    assert "0 of 100 requests were answered (100 refused)." in conclusion(Result(SETUP, {}, none, POOL, PROXY))


def test_percentiles_are_values_that_were_measured() -> None:
    values = tuple(float(number) for number in range(1, 101))
    assert [percentile(values, share) for share in (0, 0.5, 0.95, 0.99, 1)] == [1, 50, 95, 99, 100]
    assert percentile((7.0,), 0.99) == 7.0
    assert percentile((), 0.5) is None


def test_numbers_are_written_for_a_reader() -> None:
    assert [duration(s) for s in (12.345, 1.0, 0.9996, 0.135, 0.0101, 0.00005)] == [
        "12.35 s",
        "1.00 s",
        "1.00 s",
        "135 ms",
        "10.1 ms",
        "50 µs",
    ]
    assert [percent(n, 10_000) for n in (0, 1, 1030, 9999, 10_000)] == [
        "0 %",
        "< 0.1 %",
        "10.3 %",
        "> 99.9 %",
        "100 %",
    ]
    assert [times(100, n) for n in (1, 30, 99, 350, 100_000)] == [
        "1/100 of",
        "1/3.3 of",
        "equal",
        "3.5 times",
        "1,000 times",
    ]
