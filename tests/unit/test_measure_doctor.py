"""The doctor's rules: each from made facts, on both sides of each threshold; the resolver's packets; the page."""

import os
import re
import socket
import struct
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cenote.errors import ConfigError
from cenote.measure import doctor_host, doctor_slots, doctor_way
from cenote.measure.dns import BadAnswer, NameFacts, question, shortest_ttl, time_to_live
from cenote.measure.doctor import RULES, as_dict, diagnose
from cenote.measure.doctor_facts import Facts, Programs, ProxyFacts, ServerFacts, Session, WayFacts
from cenote.measure.findings import span
from cenote.measure.host import HostFacts, ServerHostFacts, look_at_server, name_servers
from cenote.measure.target import Target
from cenote.measure.verdict import Rule, Severity

OK, UNKNOWN, NOTE, WARNING, CRITICAL = (
    Severity.OK,
    Severity.NOT_KNOWN,
    Severity.NOTE,
    Severity.WARNING,
    Severity.CRITICAL,
)
MIB = 1 << 20

TARGET = Target(
    dsn="postgresql://app:geheim@db/app", host="db", port=5432, database="app", user="app", version=180001,
    max_connections=100, reserved=3, others=0, superuser=False, server_pid=None, embedded=False,
)  # fmt: skip
WAY = WayFacts(
    kind="network", address="192.0.2.7", sslmode="verify-full", tls="TLSv1.3", cipher="TLS_AES_256_GCM_SHA384",
    keepalive_idle_s=60, keepalive_interval_s=10, keepalive_count=3, user_timeout_s=None, round_trip_s=0.001,
    clock_s=0.0, clock_error_s=0.0005, log_in_s=0.02, log_in_cpu_s=0.005, used_password=True, pooler=False,
)  # fmt: skip
SETTINGS: dict[str, float | str] = {
    "superuser_reserved_connections": 3.0, "reserved_connections": 0.0, "shared_buffers": 128.0 * MIB,
    "work_mem": 4.0 * MIB, "password_encryption": "scram-sha-256", "scram_iterations": 4096.0,
    "tcp_keepalives_idle": 60.0, "tcp_keepalives_interval": 10.0, "tcp_keepalives_count": 3.0,
    "statement_timeout": 30.0, "idle_in_transaction_session_timeout": 60.0, "idle_session_timeout": 0.0,
}  # fmt: skip
SERVER = ServerFacts(
    settings=SETTINGS, sessions=(), superuser=False, role_limit=None, database_limit=None, sees_all=True,
    md5_secrets=0, most_iterations=None, way=WAY,
)  # fmt: skip
HOST = HostFacts(
    cpus=2, port_first=30001, port_last=60000, tw_reuse=2, time_wait=0, somaxconn=4096, listen_overflows=0,
    uptime_s=86_400.0, files_soft=1024, files_hard=4096, name_servers=("192.0.2.53",),
)  # fmt: skip
FACTS = Facts(target=TARGET, server=SERVER, host=HOST, overflows_now=0)
HERE = ServerHostFacts(
    memory_bytes=1024 * MIB, backends=3, backend_bytes=2 * MIB, largest_bytes=3 * MIB,
    backend_source="smaps_rollup", limits_known=True, files_soft=1024, processes=4096, accept_waiting=0,
    accept_length=200,
)  # fmt: skip

pytestmark = pytest.mark.interpreted


def with_server(**changes: Any) -> Facts:
    return replace(FACTS, server=replace(SERVER, **changes))


def with_way(**changes: Any) -> Facts:
    return with_server(way=replace(WAY, **changes))


def with_settings(**changes: float | str | None) -> Facts:
    settings = {name: value for name, value in {**SETTINGS, **changes}.items() if value is not None}
    return with_server(settings=settings)


def with_sessions(count: int, state: str = "active", age: float | None = 1.0, **more: Any) -> Facts:
    session = Session(1, "app", "web", state, age, age)
    return replace(with_server(sessions=(session,) * count), **more)


def with_host(**changes: Any) -> Facts:
    return replace(FACTS, host=replace(HOST, **changes))


def here(**changes: Any) -> Facts:
    return replace(FACTS, server_host=replace(HERE, **changes))


def programs(**given: Any) -> Facts:
    return replace(FACTS, programs=Programs(**given))


def proxy(budget: int, pools: int, *, max_clients: int = 100) -> ProxyFacts:
    return ProxyFacts("cenote.toml", True, ("db:5432",), budget, 70.0, pools, max_clients)


CASES: list[tuple[Rule, Facts, Severity]] = [
    (doctor_slots.slots_used, with_sessions(77), OK),
    (doctor_slots.slots_used, with_sessions(78), WARNING),
    (doctor_slots.slots_used, with_sessions(92), WARNING),
    (doctor_slots.slots_used, with_sessions(93), CRITICAL),
    (doctor_slots.slots_overcommitted, FACTS, UNKNOWN),
    (doctor_slots.slots_overcommitted, programs(pool_size=97), OK),
    (doctor_slots.slots_overcommitted, programs(pool_size=98), CRITICAL),
    (doctor_slots.slots_overcommitted, with_sessions(47, programs=Programs(pool_size=50)), OK),
    (doctor_slots.slots_overcommitted, with_sessions(48, programs=Programs(pool_size=50)), WARNING),
    (doctor_slots.slots_overcommitted,
     with_sessions(48, programs=Programs(pool_size=50, application="web")), OK),
    (doctor_slots.slots_overcommitted, replace(FACTS, proxy=proxy(98, 200)), CRITICAL),
    (doctor_slots.slots_overcommitted, replace(programs(pool_size=100), proxy=proxy(97, 97)), OK),
    (doctor_slots.local_pools, replace(programs(pool_size=100), proxy=proxy(67, 67)), OK),
    (doctor_slots.local_pools, replace(programs(pool_size=101), proxy=proxy(67, 67)), CRITICAL),
    (doctor_slots.local_pools, FACTS, UNKNOWN),
    (doctor_slots.local_pools, programs(pool_size=4, instances=6, workers=4), OK),
    (doctor_slots.local_pools, programs(pool_size=5, instances=5, workers=4), CRITICAL),
    (doctor_slots.pools_past_knee, programs(pool_size=20), UNKNOWN),
    (doctor_slots.pools_past_knee, programs(knee=20), UNKNOWN),
    (doctor_slots.pools_past_knee, programs(knee=20, pool_size=20), OK),
    (doctor_slots.pools_past_knee, programs(knee=20, pool_size=21), WARNING),
    (doctor_slots.pools_past_knee, programs(knee=20, pool_size=80), WARNING),
    (doctor_slots.pools_past_knee, programs(knee=20, pool_size=81), CRITICAL),
    (doctor_slots.proxy_budget, FACTS, UNKNOWN),
    (doctor_slots.proxy_budget, replace(FACTS, proxy=ProxyFacts("c.toml", False, ("other:5432",))), UNKNOWN),
    (doctor_slots.proxy_budget, replace(FACTS, proxy=proxy(67, 67)), OK),
    (doctor_slots.proxy_budget, replace(FACTS, proxy=proxy(67, 68)), NOTE),
    (doctor_slots.proxy_budget, with_sessions(30, proxy=proxy(67, 67)), OK),
    (doctor_slots.proxy_budget, with_sessions(31, proxy=proxy(67, 67)), WARNING),
    (doctor_slots.proxy_budget, replace(FACTS, proxy=proxy(97, 97)), OK),
    (doctor_slots.proxy_budget, replace(FACTS, proxy=proxy(98, 98)), CRITICAL),
    (doctor_slots.reserved_slots, FACTS, OK),
    (doctor_slots.reserved_slots, with_settings(superuser_reserved_connections=0.0), WARNING),
    (doctor_slots.superuser_login, FACTS, OK),
    (doctor_slots.superuser_login, with_server(superuser=True), NOTE),
    (doctor_slots.role_limits, FACTS, OK),
    (doctor_slots.role_limits, with_server(role_limit=5), NOTE),
    (doctor_slots.role_limits, with_server(role_limit=5, superuser=True), OK),
    (doctor_slots.role_limits, replace(with_server(database_limit=5), programs=Programs(pool_size=5)), OK),
    (doctor_slots.role_limits, replace(with_server(database_limit=5), programs=Programs(pool_size=6)), CRITICAL),
    (doctor_slots.idle_sessions, FACTS, OK),
    (doctor_slots.idle_sessions, with_sessions(24, "idle", 3600.0), OK),
    (doctor_slots.idle_sessions, with_sessions(25, "idle", 60.0), WARNING),
    (doctor_slots.idle_sessions, with_sessions(25, "idle", 59.0), OK),
    (doctor_slots.idle_sessions, with_sessions(1, "hidden", None), UNKNOWN),
    (doctor_slots.idle_in_transaction, FACTS, OK),
    (doctor_slots.idle_in_transaction, with_sessions(1, "idle in transaction", 59.0), OK),
    (doctor_slots.idle_in_transaction, with_sessions(1, "idle in transaction", 60.0), WARNING),
    (doctor_slots.idle_in_transaction, with_sessions(1, "idle in transaction (aborted)", 600.0), CRITICAL),
    (doctor_slots.idle_in_transaction, with_sessions(1, "hidden", None), UNKNOWN),
    (doctor_slots.memory, FACTS, UNKNOWN),
    (doctor_slots.memory, here(backend_bytes=None), UNKNOWN),
    (doctor_slots.memory, here(backend_bytes=6 * MIB), OK),
    (doctor_slots.memory, here(backend_bytes=7 * MIB), WARNING),
    (doctor_slots.memory, here(backend_bytes=9 * MIB), CRITICAL),
    (doctor_slots.work_memory, FACTS, UNKNOWN),
    (doctor_slots.work_memory, here(), OK),
    (doctor_slots.work_memory, here(memory_bytes=527 * MIB), NOTE),
    (doctor_slots.work_memory, programs(server_memory=0.52), OK),
    (doctor_slots.work_memory, programs(server_memory=0.5), NOTE),
    (doctor_way.pooler_between, FACTS, OK),
    (doctor_way.pooler_between, with_way(pooler=True), NOTE),
    (doctor_way.log_in_rate, FACTS, OK),
    (doctor_way.log_in_rate, programs(rate=50), OK),
    (doctor_way.log_in_rate, programs(rate=51), WARNING),
    (doctor_way.log_in_rate, programs(rate=400), WARNING),
    (doctor_way.log_in_rate, programs(rate=401), CRITICAL),
    (doctor_way.password_encryption, FACTS, OK),
    (doctor_way.password_encryption, with_server(md5_secrets=None), OK),
    (doctor_way.password_encryption, with_server(md5_secrets=1), WARNING),
    (doctor_way.password_encryption, with_settings(password_encryption="md5"), WARNING),
    (doctor_way.tls, FACTS, OK),
    (doctor_way.tls, with_way(tls="TLSv1.1"), WARNING),
    (doctor_way.tls, with_way(sslmode="require"), NOTE),
    (doctor_way.tls, with_way(sslmode="require", kind="loopback"), OK),
    (doctor_way.tls, with_way(tls="", cipher=""), WARNING),
    (doctor_way.tls, with_way(tls="", cipher="", kind="socket"), OK),
    (doctor_way.round_trip, FACTS, OK),
    (doctor_way.keepalive_client, FACTS, OK),
    (doctor_way.keepalive_client, with_way(keepalive_idle_s=870), OK),
    (doctor_way.keepalive_client, with_way(keepalive_idle_s=871), NOTE),
    (doctor_way.keepalive_client, with_way(keepalive_idle_s=None), NOTE),
    (doctor_way.keepalive_client, with_way(keepalive_idle_s=7200, kind="loopback"), OK),
    (doctor_way.keepalive_client, with_way(kind="socket"), OK),
    (doctor_way.keepalive_server, FACTS, OK),
    (doctor_way.keepalive_server, with_settings(tcp_keepalives_idle=870.0), OK),
    (doctor_way.keepalive_server, with_settings(tcp_keepalives_idle=871.0), NOTE),
    (doctor_way.keepalive_server, with_way(kind="socket"), UNKNOWN),
    (doctor_way.statement_timeout, FACTS, OK),
    (doctor_way.statement_timeout, with_settings(statement_timeout=0.0), NOTE),
    (doctor_way.statement_timeout, with_settings(statement_timeout=0.0, transaction_timeout=9.0), OK),
    (doctor_way.idle_in_transaction_timeout, FACTS, OK),
    (doctor_way.idle_in_transaction_timeout, with_settings(idle_in_transaction_session_timeout=0.0), NOTE),
    (doctor_way.idle_session_timeout, FACTS, OK),
    (doctor_way.idle_session_timeout, with_settings(idle_session_timeout=None), OK),
    (doctor_way.idle_session_timeout, with_settings(idle_session_timeout=301.0), OK),
    (doctor_way.idle_session_timeout, with_settings(idle_session_timeout=300.0), WARNING),
    (doctor_way.dns_ttl, FACTS, OK),
    (doctor_way.dns_ttl, replace(FACTS, name=NameFacts(60)), OK),
    (doctor_way.dns_ttl, replace(FACTS, name=NameFacts(59), lookup_s=0.002), NOTE),
    (doctor_way.dns_ttl, replace(FACTS, name=NameFacts(None, "no answer")), UNKNOWN),
    (doctor_way.clock, with_way(clock_s=-1.0), OK),
    (doctor_way.clock, with_way(clock_s=-1.1), WARNING),
    (doctor_way.clock, with_way(clock_s=1.1, clock_error_s=0.2), OK),
    (doctor_way.clock, with_way(clock_s=61.0), CRITICAL),
    (doctor_host.ephemeral_ports, FACTS, OK),
    (doctor_host.ephemeral_ports, programs(rate=249), OK),
    (doctor_host.ephemeral_ports, programs(rate=250), WARNING),
    (doctor_host.ephemeral_ports, programs(rate=450), CRITICAL),
    (doctor_host.ephemeral_ports, replace(programs(rate=450), host=replace(HOST, tw_reuse=1)), OK),
    (doctor_host.ephemeral_ports, replace(with_way(kind="loopback"), programs=Programs(rate=450)), OK),
    (doctor_host.ephemeral_ports, with_way(kind="socket"), OK),
    (doctor_host.ephemeral_ports, with_host(port_first=None), UNKNOWN),
    (doctor_host.time_wait, with_host(time_wait=14_999), OK),
    (doctor_host.time_wait, with_host(time_wait=15_000), WARNING),
    (doctor_host.time_wait, with_host(time_wait=27_000), CRITICAL),
    (doctor_host.time_wait, with_host(time_wait=None), UNKNOWN),
    (doctor_host.time_wait, replace(with_way(kind="loopback"), host=replace(HOST, time_wait=27_000)), OK),
    (doctor_host.open_files, FACTS, OK),
    (doctor_host.open_files, with_host(files_soft=None), OK),
    (doctor_host.open_files, programs(pool_size=960), OK),
    (doctor_host.open_files, programs(pool_size=961), CRITICAL),
    (doctor_host.open_files, replace(FACTS, proxy=proxy(32, 32, max_clients=4000)), OK),
    (doctor_host.open_files, replace(FACTS, proxy=proxy(33, 33, max_clients=4000)), WARNING),
    (doctor_host.server_files_and_processes, FACTS, UNKNOWN),
    (doctor_host.server_files_and_processes, here(limits_known=False), UNKNOWN),
    (doctor_host.server_files_and_processes, here(processes=130), OK),
    (doctor_host.server_files_and_processes, here(processes=129), CRITICAL),
    (doctor_host.server_files_and_processes, here(processes=None), OK),
    (doctor_host.accept_queue, FACTS, OK),
    (doctor_host.accept_queue, with_host(somaxconn=None), UNKNOWN),
    (doctor_host.accept_queue, replace(programs(pool_size=128), host=replace(HOST, somaxconn=128)), OK),
    (doctor_host.accept_queue, replace(programs(pool_size=129), host=replace(HOST, somaxconn=128)), WARNING),
    (doctor_host.accept_queue, here(accept_waiting=99), OK),
    (doctor_host.accept_queue, here(accept_waiting=100), WARNING),
    (doctor_host.accept_queue, here(accept_length=None), OK),
    (doctor_host.accept_overflows, FACTS, OK),
    (doctor_host.accept_overflows, with_host(listen_overflows=1), NOTE),
    (doctor_host.accept_overflows, replace(with_host(listen_overflows=1), overflows_now=1), WARNING),
    (doctor_host.accept_overflows, with_host(listen_overflows=None), UNKNOWN),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "facts", "severity"), CASES, ids=[f"{rule.__name__}-{at}" for at, (rule, _, _) in enumerate(CASES)]
)
def test_each_rule_judges_by_its_threshold(rule: Rule, facts: Facts, severity: Severity) -> None:
    verdict = rule(facts)
    assert verdict.severity is severity, verdict
    assert verdict.number
    if severity in (NOTE, WARNING, CRITICAL):
        assert verdict.consequence
        assert verdict.remedy


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_is_seen_on_both_sides_of_its_threshold(rule: Rule) -> None:
    seen = {severity for tried, _, severity in CASES if tried is rule}
    assert OK in seen
    assert len(seen) > 1 or rule is doctor_way.round_trip


def test_the_numbers_are_those_of_the_facts() -> None:
    verdict = doctor_slots.slots_overcommitted(programs(pool_size=20, instances=6))
    assert verdict.number == "120 announced connections, 97 fit"
    assert "23 connections" in verdict.consequence
    assert "97 at most" in verdict.remedy
    assert verdict.figures == {"may_connect": 120, "announced": 120, "others": 0, "usable": 97}
    assert "a pool size of 16 or less" in doctor_slots.local_pools(programs(pool_size=20, instances=6)).remedy
    assert "Not even one" in doctor_slots.local_pools(programs(pool_size=20, instances=98)).remedy
    ports = doctor_host.ephemeral_ports(programs(rate=300))
    assert ports.number == "300 connections in a second keep 18,000 of 30,000 ports in TIME_WAIT"
    assert doctor_way.log_in_rate(programs(rate=100)).figures["cores"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("facts", "status"),
    [
        (FACTS, 0),
        (with_server(superuser=True), 0),
        (with_settings(superuser_reserved_connections=0.0), 3),
        (programs(pool_size=98), 4),
    ],
)
def test_the_exit_status_is_that_of_the_gravest_finding(facts: Facts, status: int) -> None:
    diagnosis = diagnose(facts)
    assert diagnosis.exit_status == status
    severities = [finding.verdict.severity for finding in diagnosis.findings]
    assert severities == sorted(severities, reverse=True)


def test_the_json_names_every_finding_and_no_password() -> None:
    made = as_dict(diagnose(FACTS))
    assert {finding["name"] for finding in made["findings"]} == {rule.__name__ for rule in RULES}
    assert "geheim" not in repr(made)


def test_every_finding_has_its_chapter_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    chapters = re.findall(r"^### (\w+)$", page, re.MULTILINE)
    assert chapters == [rule.__name__ for rule in RULES]


def test_what_cannot_be_said_of_programs_is_told_all_at_once() -> None:
    with pytest.raises(ConfigError) as told:
        Programs(instances=0, rate=0.0, knee=-1).check()
    assert len(told.value.problems) == 3
    with pytest.raises(ConfigError, match="give that too"):
        Programs(instances=3).check()
    Programs(instances=3, pool_size=2).check()


# -- the resolver -----------------------------------------------------------------------------------------------


def answer(*records: tuple[int, int, bytes], number: int = 7, flags: int = 0x8180) -> bytes:
    """A packet with a question and these records (type, time to live, data), their names pointers to it."""
    asked = question("db.example.org", 1, number)[12:]
    head = struct.pack(">HHHHHH", number, flags, 1, len(records), 0, 0)
    return (
        head
        + asked
        + b"".join(
            b"\xc0\x0c" + struct.pack(">HHIH", kind, 1, ttl, len(data)) + data for kind, ttl, data in records
        )
    )


def test_the_shortest_time_to_live_of_aliases_and_addresses_counts() -> None:
    alias, address = (5, 5, b"\x01x\xc0\x0c"), (1, 60, bytes(4))
    assert shortest_ttl(answer(alias, address), 7) == 5
    assert shortest_ttl(answer((16, 1, b"text"), (28, 30, bytes(16))), 7) == 30


@pytest.mark.parametrize(
    ("packet", "words"),
    [
        (answer((1, 60, bytes(4)), number=8), "not to our question"),
        (answer((1, 60, bytes(4)), flags=0x0100), "not to our question"),
        (answer(flags=0x8183), "no such name"),
        (answer(), "knows no address"),
        (answer((5, 5, b"\x01x\xc0\x0c")), "knows no address"),
        (answer((1, 60, bytes(4)))[:40], "cut off"),
        (b"", "cut off"),
    ],
)
def test_an_answer_that_does_not_fit_is_not_believed(packet: bytes, words: str) -> None:
    with pytest.raises(BadAnswer, match=words):
        shortest_ttl(packet, 7)


def test_whatever_the_packet_it_is_read_to_an_end_or_refused() -> None:
    whole = answer((5, 5, b"\x01x\xc0\x0c"), (1, 60, bytes(4)))
    for at in range(12, len(whole)):
        for byte in (0x00, 0x3F, 0xC0, 0xFF):
            packet = whole[:at] + bytes((byte,)) + whole[at + 1 :]
            try:
                assert shortest_ttl(packet, 7) >= 0
            except BadAnswer:
                pass


def test_without_a_name_server_that_can_be_asked_nothing_is_known() -> None:
    assert time_to_live("db", ()) == NameFacts(None, "/etc/resolv.conf names no name server")
    assert "cannot be asked" in time_to_live("db", ("127.0.0.1",), port=9).why
    assert "cannot be asked" in time_to_live("a" * 64, ("127.0.0.1",)).why


def test_the_name_server_is_asked_once_for_the_name_and_believed() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as there:
        there.bind(("127.0.0.1", 0))
        there.settimeout(10)

        def serve() -> None:
            packet, sender = there.recvfrom(512)
            there.sendto(answer((1, 42, bytes(4)), number=int.from_bytes(packet[:2], "big")), sender)

        thread = threading.Thread(target=serve)
        thread.start()
        found = time_to_live("db.example.org", ("127.0.0.1",), port=there.getsockname()[1])
        thread.join()
    assert found == NameFacts(42, "", "127.0.0.1")


def test_name_servers_are_those_of_the_file() -> None:
    text = "# nameserver 192.0.2.1\nsearch example.org\nnameserver 192.0.2.2\nnameserver fe80::1%eth0\n"
    assert list(name_servers(text)) == ["192.0.2.2", "fe80::1%eth0"]


def test_long_times_are_written_for_a_reader() -> None:
    said = {9.0: "9.00 s", 61.0: "61 s", 300: "5 min", 7875: "2 h 11 min", 3600: "1 h", 90_000: "1 d 1 h"}
    assert {seconds: span(seconds) for seconds in said} == said


def test_an_unnamed_session_is_a_stranger_and_a_named_one_is_counted_once() -> None:
    mixed = replace(
        with_server(sessions=(Session(1, "app", "web", "idle", 1.0), Session(2, "app", "", "idle", 1.0))),
        programs=Programs(pool_size=97, application="web"),
    )
    assert doctor_slots.slots_overcommitted(mixed).figures["others"] == 1


def test_the_remedy_for_a_short_accept_queue_is_that_of_what_bounds_it() -> None:
    by_server = doctor_host.accept_queue(here(accept_waiting=150))
    assert "holds 200 (as many as it asked for; somaxconn is 4,096), 150 in it now" in by_server.number
    assert "somaxconn changes nothing" in by_server.remedy
    by_kernel = doctor_host.accept_queue(replace(here(accept_waiting=150), host=replace(HOST, somaxconn=200)))
    assert "holds 200 (somaxconn)" in by_kernel.number
    assert "A higher net.core.somaxconn" in by_kernel.remedy


def test_the_length_of_an_accept_queue_is_what_the_kernel_granted() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=7) as listening:
        port = listening.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            seen = look_at_server(os.getpid(), port, [])
    assert (seen.accept_waiting, seen.accept_length) == (1, 7)


def test_one_role_has_and_two_roles_have() -> None:
    assert "1 role has an md5" in doctor_way.password_encryption(with_server(md5_secrets=1)).number
    assert "2 roles have an md5" in doctor_way.password_encryption(with_server(md5_secrets=2)).number
