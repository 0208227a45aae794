"""The doctor: looks at a server, the way to it and this machine, and names the limits that bite.

It gathers facts, asks every rule of its table, and changes nothing anywhere. It loads the server with a few
questions on one connection, three log-ins one after the other.
"""

import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cenote.errors import MissingDependency, TargetUnusable
from cenote.measure import doctor_host, doctor_slots, doctor_way
from cenote.measure.dns import NameFacts, time_to_live
from cenote.measure.doctor_facts import Facts, Programs, ProxyFacts
from cenote.measure.host import ServerHostFacts, listen_overflows, look_at_host, look_at_server
from cenote.measure.target import Target, target
from cenote.measure.verdict import Finding, Rule, Severity

RULES: tuple[Rule, ...] = (
    doctor_slots.slots_used,
    doctor_slots.slots_overcommitted,
    doctor_slots.local_pools,
    doctor_slots.pools_past_knee,
    doctor_slots.proxy_budget,
    doctor_slots.role_limits,
    doctor_slots.reserved_slots,
    doctor_slots.superuser_login,
    doctor_slots.idle_sessions,
    doctor_slots.idle_in_transaction,
    doctor_slots.memory,
    doctor_slots.work_memory,
    doctor_way.pooler_between,
    doctor_way.log_in_rate,
    doctor_way.password_encryption,
    doctor_way.tls,
    doctor_way.round_trip,
    doctor_way.keepalive_client,
    doctor_way.keepalive_server,
    doctor_way.statement_timeout,
    doctor_way.idle_in_transaction_timeout,
    doctor_way.idle_session_timeout,
    doctor_way.dns_ttl,
    doctor_way.clock,
    doctor_host.ephemeral_ports,
    doctor_host.time_wait,
    doctor_host.open_files,
    doctor_host.server_files_and_processes,
    doctor_host.accept_queue,
    doctor_host.accept_overflows,
)
"""Every rule, in the order in which findings of one severity are shown. A rule's name is its finding's."""

_EXITS = {Severity.WARNING: 3, Severity.CRITICAL: 4}
_FULL = ("too many clients already", "remaining connection slots are reserved", "too many connections for")


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found, the gravest first, and the facts it rests on."""

    facts: Facts
    findings: tuple[Finding, ...]

    @property
    def worst(self) -> Severity:
        return max((finding.verdict.severity for finding in self.findings), default=Severity.OK)

    @property
    def exit_status(self) -> int:
        """0, 3 with a warning, 4 with something critical."""
        return _EXITS.get(self.worst, 0)

    def count(self, severity: Severity) -> int:
        return sum(finding.verdict.severity is severity for finding in self.findings)


def examine(url: str | None, programs: Programs, config: Path | None = None) -> Diagnosis:
    """Look at the server of `url`, or at an embedded one, and judge. Takes a second or two.

    :param config: a configuration of `cenote serve`, whose budget is to be judged too
    :raises ConfigError: naming every problem of `programs` or of the configuration
    :raises MissingDependency: a package is not installed
    :raises TargetUnusable: the server cannot be reached, refuses us, or stops answering
    """
    programs.check()
    read = None if config is None else _read(config)
    try:
        with target(url) as seen:
            return diagnose(_facts(seen, programs, config, read))
    except TargetUnusable as error:
        if any(words in str(error) for words in _FULL):
            raise TargetUnusable(
                f"{_words(error)}. No slot is left for the doctor: as a superuser, or as a member of "
                "pg_use_reserved_connections, it may take a reserved one"
            ) from None
        raise


def diagnose(facts: Facts, rules: Sequence[Rule] = RULES) -> Diagnosis:
    """Judge these facts by every rule."""
    findings = [Finding(rule.__name__, rule(facts)) for rule in rules]
    return Diagnosis(facts, tuple(sorted(findings, key=lambda finding: -finding.verdict.severity)))


def as_dict(diagnosis: Diagnosis) -> dict[str, Any]:
    """Everything for JSON; without the password."""
    facts = asdict(diagnosis.facts)
    del facts["target"]["dsn"]
    return {
        "server": diagnosis.facts.target.title,
        "worst": diagnosis.worst.word,
        "exit_status": diagnosis.exit_status,
        "findings": [
            {
                "name": finding.name,
                "severity": finding.verdict.severity.word,
                "number": finding.verdict.number,
                "consequence": finding.verdict.consequence,
                "remedy": finding.verdict.remedy,
                "figures": finding.verdict.figures,
                "docs": f"docs/doctor.md#{finding.name}",
            }
            for finding in diagnosis.findings
        ],
        "facts": facts,
    }


def _words(error: TargetUnusable) -> str:
    return str(error).removesuffix(f" [{error.code}]")


# -- the facts --------------------------------------------------------------------------------------------------


def _facts(seen: Target, programs: Programs, config: Path | None, read: Any) -> Facts:
    from cenote.measure.server_facts import look_at_sessions_and_way

    before = listen_overflows()
    name, lookup_s = _name(seen.host)

    def meanwhile(pids: list[int]) -> ServerHostFacts | None:
        return None if seen.server_pid is None else look_at_server(seen.server_pid, seen.port, pids)

    server, server_host = look_at_sessions_and_way(seen, meanwhile)
    host = look_at_host(server.way.address, seen.port)
    return Facts(
        target=seen,
        server=server,
        host=host,
        server_host=server_host,
        name=name,
        lookup_s=lookup_s,
        overflows_now=None if before is None or host.listen_overflows is None else host.listen_overflows - before,
        programs=programs,
        proxy=None if config is None else _proxy(config, read, seen),
    )


def _name(host: str) -> tuple[NameFacts | None, float | None]:
    """What is known of the host's name, and how long the C library takes for it; None for an address."""
    if not host or host.startswith(("/", "@")):
        return None, None
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        pass
    else:
        return None, None
    began = time.perf_counter()
    try:
        socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        lookup_s: float | None = time.perf_counter() - began
    except OSError:
        lookup_s = None
    return time_to_live(host, look_at_host(None, 0).name_servers), lookup_s


def _read(path: Path) -> Any:
    try:
        from cenote.proxy.config import load_config
    except ImportError as error:
        raise MissingDependency(
            f'--config needs {error.name}, which is not installed: pip install "cenote[proxy]"'
        ) from None
    return load_config(path)


def _proxy(path: Path, config: Any, seen: Target) -> ProxyFacts:
    """What that configuration makes of this server, as the daemon itself would reckon."""
    from cenote.proxy.budget import server_name, server_options
    from cenote.proxy.config import pool_names, pool_options

    names = {database: server_name(options) for database, options in config.databases.items()}
    here = {name for database, name in names.items() if _is_at(config.databases[database], seen)}
    servers = tuple(dict.fromkeys(names.values()))
    if not here:
        return ProxyFacts(str(path), False, servers)
    usable = max(1, seen.max_connections - seen.reserved)
    options = [server_options(config, name) for name in sorted(here)]
    budgets = [one.max_connections or max(1, int(one.max_connections_percent * usable / 100)) for one in options]
    plain = len(options) == 1 and options[0].max_connections is None
    return ProxyFacts(
        file=str(path),
        known=True,
        servers=servers,
        budget=sum(budgets),
        percent=options[0].max_connections_percent if plain else None,
        pools=sum(
            pool_options(config, database, user).max_size
            for database, user in pool_names(config)
            if names[database] in here
        ),
        max_clients=config.listen.max_clients,
    )


_HERE = frozenset(("localhost", "127.0.0.1", "::1"))


def _is_at(database: Any, seen: Target) -> bool:
    hosts = [host.strip() for host in str(database.host).split(",")]
    ports = [int(word) for word in str(database.port).split(",")]
    places = zip(hosts, ports if len(ports) == len(hosts) else ports * len(hosts), strict=False)
    return any(port == seen.port and (host == seen.host or {host, seen.host} <= _HERE) for host, port in places)
