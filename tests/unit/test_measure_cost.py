"""The pure parts of `cenote cost`: samples in, figures, words and pictures out."""

import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from cenote.errors import ConfigError, ProtocolError, TargetUnusable
from cenote.measure import cost_picture, ink
from cenote.measure.address import Address, is_number
from cenote.measure.anatomy import Anatomy, Session, Tls
from cenote.measure.anatomy_login import LogIn
from cenote.measure.channel import Reading, Step
from cenote.measure.cost import Result, ServerCpu, Setup
from cenote.measure.cost_figures import Distance, Spread, distance, spread
from cenote.measure.cost_https import is_origin, origin_of
from cenote.measure.cost_memory import Memory, typical_work
from cenote.measure.cost_saving import saving
from cenote.measure.cost_server import Footprint, Ports, _waiting_sides
from cenote.measure.cost_words import amount, as_dict, conclusion, facts, phase_rows, saving_rows
from cenote.measure.target import Target, one_line
from cenote.wire import messages
from cenote.wire.scram import ServerExchange, Verifier

pytestmark = pytest.mark.interpreted

MIB = 2**20


def anatomy(scale: float = 1.0, *, rtt_s: float = 0.0) -> Anatomy:
    """A connection of 4 round trips: 1 ms of its own for each phase that waits."""

    def step(trips: int, up: int = 10, down: int = 20) -> Step:
        return Step(scale * (0.001 + trips * rtt_s), 0.0001, up, down, trips)

    steps = {
        "tcp": step(1, 0, 0),
        "first_answer": step(1),
        "authentication": step(1),
        "setup": step(1),
        "parameters": step(0, 0, 400),
        "first_query": step(1),
        "warm_query": step(1),
        "teardown": step(0, 5, 0),
        "gone": step(1, 0, 0),
    }
    ready = sum(steps[name].seconds for name in ("tcp", "first_answer", "authentication", "setup", "parameters"))
    return Anatomy(steps=steps, method="scram-sha-256", iterations=4096, ready_s=ready)


def way(rtt_s: float | None = None) -> Distance:
    return distance(rtt_s, [anatomy(scale, rtt_s=rtt_s or 0.0) for scale in (0.9, 1.0, 1.1)])


def one(value: float) -> Spread:
    return Spread(value, value, value, 1)


RESULT = Result(
    setup=Setup(rtts=(0.02,)),
    target=Target(
        dsn="postgresql://app:secret@db/app",
        host="db",
        port=5432,
        database="app",
        user="app",
        version=180001,
        max_connections=100,
        reserved=3,
        others=0,
        superuser=False,
        server_pid=1,
        embedded=False,
    ),
    machine={"cpus": 2, "system": "Linux", "python": "3", "cenote": "0", "core": "pure Python"},
    unix=False,
    tls=None,
    resumed=None,
    method="scram-sha-256",
    iterations=4096,
    derivation=one(0.002),
    parameters=15,
    direct=True,
    local=True,
    near=way(),
    far=(way(0.02),),
    libpq=one(0.006),
    libpq_cpu=one(0.003),
    client_cpu_s=0.002,
    server_cpu=ServerCpu(0.0051, 100, one(0.003), one(0.0003), one(0.0001)),
    memory=Memory(Footprint(4 * MIB, 2 * MIB, 1000), Footprint(12 * MIB, 10 * MIB, 1000), None, None, "", "no"),
    ports=Ports(3, 0, 30_000, "2"),
)


def test_a_spread_is_made_of_values_that_were_measured() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert spread(values) == Spread(50.5, 10.0, 90.0, 100)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0, 1)


def test_a_step_is_what_lies_between_two_readings() -> None:
    step = Reading(1.0, 0.5, 10, 20, 1).until(Reading(1.5, 0.75, 14, 120, 3))
    assert step == Step(0.5, 0.25, 4, 100, 2)


def test_a_distance_knows_when_it_was_ready_and_how_long_the_slot_was_held() -> None:
    seen = way(0.02)
    assert seen.samples == 3
    assert seen.trips == 4
    assert seen.ready.median == pytest.approx(0.085)
    assert seen.answered.median == pytest.approx(0.106)
    # Without TCP, which the server's process does not wait for; with the query, the goodbye and its end.
    assert seen.held.median == pytest.approx(0.085 - 0.021 + 0.021 + 0.001 + 0.021)
    assert [phase.name for phase in seen.phases] == list(anatomy().steps)
    assert seen.phase("dns") is None


def test_what_pooling_saves_is_rate_times_cost() -> None:
    saved = saving(RESULT, rate=200)
    assert saved.server_cpu_s == pytest.approx(200 * (0.0051 - 0.0001))
    assert saved.client_cpu_s == pytest.approx(0.4)
    assert saved.server_core_rate == pytest.approx(200)
    assert (saved.ports, saved.ports_rate) == (12_000, 500)
    near, far = saved.at
    assert near.sessions == pytest.approx(200 * RESULT.near.held.median)
    assert far.busy == pytest.approx(200 * 0.021)
    assert far.pool_bytes == pytest.approx(far.busy * 12 * MIB)
    assert near.pool_bytes == 12 * MIB, "a pool has one connection at least"
    assert far.slots_rate == pytest.approx(RESULT.target.free / RESULT.far[0].held.median)


def test_what_was_not_measured_is_not_saved() -> None:
    blind = Memory(Footprint(None, None, None), Footprint(None, None, None), None, None, "far away", "not allowed")
    unseen = replace(RESULT, server_cpu=None, memory=blind, ports=Ports(0, 0, 30_000, "2"), local=False)
    saved = saving(unseen)
    assert (saved.server_cpu_s, saved.server_core_rate, saved.ports, saved.ports_rate) == (None, None, None, None)
    assert {at.session_bytes for at in saved.at} == {None}
    said = dict(facts(unseen))
    assert said["backend memory"] == "not known: far away"
    assert said["as it says itself"] == "not known: not allowed"
    assert said["server CPU"].startswith("not known: ")
    assert "ended them by RST" in said["ports"]
    assert "server" not in conclusion(unseen)[1]


def test_the_conclusion_is_made_of_the_figures() -> None:
    assert conclusion(RESULT) == [
        "A query on a new connection is answered after 6 ms, on one that is there after 1 ms: 6.0 times as fast.",
        "At 100 requests a second a pool saves 0.5 s of CPU on the server and 0.2 s of CPU on the client, every "
        "second.",
        "It keeps 6,000 ports of a client on another machine out of TIME_WAIT (there are 30,000 for one address).",
        "With a connection for each request, one CPU of the server does nothing else from 200/s on; ports run out "
        "at 500/s; the server's 95 free slots are full at 13,571/s (same host), 888/s (+20 ms).",
    ]


def test_the_table_has_the_sum_before_the_first_query() -> None:
    rows = phase_rows(RESULT.near)
    assert [row[0] for row in rows][4:7] == ["session parameters", "ready", "first query"]
    assert rows[5] == ("ready", "5 ms", "4.5 ms to 5.5 ms", "4", "30", "460", "500 µs")
    assert rows[-1][3] == "not waited for"
    assert [row[0] for row in saving_rows(RESULT, saving(RESULT))] == ["same host", "+20 ms"]


def test_the_json_has_every_figure_and_no_password() -> None:
    figures = as_dict(RESULT)
    assert "secret" not in str(figures)
    assert figures["target"]["free"] == 95
    assert figures["saving"]["ports"] == 6000
    assert figures["round_trips_to_ready"] == 4


def test_refused_tls_and_a_second_key_share_are_told() -> None:
    asked = anatomy()
    asked.steps["first_answer"] = replace(asked.steps["first_answer"], up=8)
    assert (
        "asked for (sslmode=prefer) and refused"
        in dict(facts(replace(RESULT, near=distance(None, [asked]))))["TLS"]
    )
    assert dict(facts(RESULT))["TLS"] == "none"
    shaken = anatomy()
    shaken.steps["tls"] = Step(0.002, 0.001, 1000, 1400, 2)
    tls = Tls("TLSv1.3", "TLS_AES_256_GCM_SHA384", False, False)
    said = dict(facts(replace(RESULT, tls=tls, near=distance(None, [shaken]))))["TLS"]
    assert "each connection pays a full handshake; 2 round trips instead of 1" in said


def test_numbers_are_short() -> None:
    assert [amount(value) for value in (0.00412, 1.26, 12.6, 26525.2)] == ["0.0041", "1.3", "13", "26,525"]


@pytest.mark.parametrize("colours", [ink.LIGHT, ink.DARK], ids=["light", "dark"])
def test_the_picture_is_drawn_with_one_distance_and_with_several(tmp_path: Path, colours: ink.Ink) -> None:
    for result in (RESULT, replace(RESULT, far=()), replace(RESULT, far=(way(0.001), way(0.02)))):
        path = tmp_path / "picture.png"
        ink.save(
            lambda figure, paper, result=result: cost_picture.draw(result, figure, paper),  # type: ignore[misc]
            path,
            size=cost_picture.size(result),
            ink=colours,
        )
        assert path.read_bytes().startswith(b"\x89PNG")


def test_ports_in_time_wait_are_told_apart_by_side() -> None:
    table = (
        "  sl  local_address rem_address   st tx_queue rx_queue\n"
        "   0: 0100007F:1538 00000000:0000 0A 00000000:00000000\n"  # the listener
        "   1: 0100007F:8001 0100007F:1538 06 00000000:00000000\n"  # ours, at this end
        "   2: 0100007F:1538 0100007F:8002 06 00000000:00000000\n"  # ours, at the server's
        "   3: 0100007F:8003 0100007F:1538 06 00000000:00000000\n"  # another's
        "   4: 0100007F:8004 0100007F:1538 01 00000000:00000000\n"  # open
    )
    assert list(_waiting_sides(table, {0x8001, 0x8002, 0x8004}, 5432)) == ["client", "server"]


def test_every_problem_of_a_setup_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        Setup(samples=0, rate=0, seconds=0, rtts=(0.0,) * 9, sql="a\0b").check()
    problems = caught.value.problems
    assert [problem.split()[0].rstrip(":") for problem in problems[:4]] == ["samples", "rate", "seconds", "rtt"]
    assert len(problems) == 4 + 9 + 1


def test_an_origin_is_read_from_its_url() -> None:
    assert is_origin("HTTPS://example.com")
    assert not is_origin("postgresql://example.com")
    assert not is_origin(None)
    origin = origin_of("https://Example.com:8443/a/b?c=d#e")
    assert (origin.host, origin.port, origin.path) == ("example.com", 8443, "/a/b?c=d")
    assert origin_of("http://example.com").path == "/"
    for url, said in (("https://", "no host"), ("https://u@h/", "user's name"), ("https://h:x/", "no URL")):
        with pytest.raises(ConfigError, match=said):
            origin_of(url)


def test_a_number_is_not_looked_up() -> None:
    assert [is_number(host) for host in ("127.0.0.1", "::1", "fe80::1%eth0", "localhost", "db")] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_a_used_backend_has_seen_catalogs_a_join_and_prepared_statements() -> None:
    work = typical_work()
    assert sum(text.startswith("PREPARE") for text in work) == 10
    assert sum(text.startswith("EXECUTE") for text in work) == 60
    assert all(text.startswith(("SELECT", "PREPARE", "EXECUTE")) for text in work)


# -- the log-in -------------------------------------------------------------------------------------------------

ADDRESS = Address("h", 1, 2, ("h", 1), False, "app", "pw", (), False, None, False, False)


def test_scram_is_answered_and_the_server_has_to_prove_itself() -> None:
    log_in = LogIn(ADDRESS, None)
    server = ServerExchange(Verifier.of_password("pw", b"salt" * 4, 4096))
    first = log_in.answer(messages.authentication_sasl(["SCRAM-SHA-256"])[5:])
    challenge = server.first(first[first.index(b"\0") + 5 :])
    assert not log_in.last_word
    final = server.final(log_in.answer(messages.authentication_sasl_continue(challenge)[5:]))
    assert log_in.last_word
    assert final is not None
    with pytest.raises(ProtocolError, match="does not know the password's verifier"):
        log_in.take(messages.authentication_sasl_final(b"v=" + b"A" * 43 + b"=")[5:])
    log_in.take(messages.AUTHENTICATION_OK[5:])
    assert not log_in.proven, "let in without its proof"
    log_in.take(messages.authentication_sasl_final(final)[5:])
    log_in.take(messages.AUTHENTICATION_OK[5:])
    assert log_in.proven
    assert (log_in.method, log_in.iterations) == ("scram-sha-256", 4096)
    assert log_in.derivation_s > 0


def test_what_cannot_be_answered_is_told() -> None:
    gss = (7).to_bytes(4, "big")
    with pytest.raises(TargetUnusable, match="authentication of kind 7"):
        LogIn(ADDRESS, None).answer(gss)
    with pytest.raises(TargetUnusable, match="none is known"):
        LogIn(replace(ADDRESS, password=None), None).answer(messages.AUTHENTICATION_CLEARTEXT[5:])
    bound = replace(ADDRESS, binding_required=True)
    with pytest.raises(TargetUnusable, match="offers SCRAM without it"):
        LogIn(bound, None).answer(messages.authentication_sasl(["SCRAM-SHA-256"])[5:])
    with pytest.raises(TargetUnusable, match="does not ask for SCRAM"):
        LogIn(bound, None).answer(messages.authentication_md5(b"salt")[5:])


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (
            'connection failed: connection to server at "::1", port 1 failed: Connection refused\n'
            "\tIs the server running on that host and accepting TCP/IP connections?",
            'connection to server at "::1", port 1 failed: Connection refused. '
            "Is the server running on that host and accepting TCP/IP connections?",
        ),
        ("connection failed: FATAL:  no\nFATAL:  no", "FATAL: no"),
        ('syntax error at or near "x"\nLINE 1: x\n        ^', 'syntax error at or near "x". LINE 1: x'),
        ("", "ValueError"),
    ],
)
def test_a_drivers_lines_are_told_on_one_line_and_once(said: str, line: str) -> None:
    assert one_line(ValueError(said)) == line


def test_a_server_that_answers_the_wish_for_tls_with_an_error_is_quoted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def refuse() -> None:
            with listening.accept()[0] as client:
                client.recv(8)
                client.sendall(messages.error("FATAL", "57P03", "the database system is in recovery mode"))

        server = threading.Thread(target=refuse)
        server.start()
        address = replace(ADDRESS, family=socket.AF_INET, sockaddr=listening.getsockname(), asks_tls=True)
        with pytest.raises(TargetUnusable, match=r"TLS: the server says: .* in recovery mode \(57P03\)"):
            Session(address).__enter__()
        server.join()
