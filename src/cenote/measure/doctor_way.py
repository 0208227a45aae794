"""The doctor's rules about the way to the server: log-in, TLS, keep-alive, name, clock, time limits.

Pure functions from facts to verdicts; each is known by its name, which docs/doctor.md explains.
"""

from cenote.measure.doctor_facts import Facts
from cenote.measure.findings import duration, span
from cenote.measure.verdict import Severity, Verdict, graded, not_known, note, ok, warning

_CORE_WARN, _CORE_CRITICAL = 0.25, 1.0  # of one core; of all
_DEAD_PEER_S = 900.0
_SHORT_TTL_S = 60
_CLOCK_WARN_S, _CLOCK_CRITICAL_S = 1.0, 60.0
_POOL_IDLE_S = 300.0  # the pools' default idle_timeout
_OLD_TLS = ("SSLv3", "TLSv1", "TLSv1.1")


def pooler_between(facts: Facts) -> Verdict:
    """Whether a pooler answers for the server."""
    if not facts.server.way.pooler:
        return ok("the server itself answers")
    return note(
        "a pooler answers: the session has another process number than the one that was announced",
        "TLS, keep-alive, log-in and round trip are those of the way to the pooler; the sessions and settings are "
        "the server's behind it.",
        "Examine the server directly as well.",
    )


def log_in_rate(facts: Facts) -> Verdict:
    """What a log-in costs here (SCRAM's iterations are paid by the client), against how many there are."""
    way, rate = facts.server.way, facts.programs.rate
    iterations = _iterations(facts)
    scram = f", SCRAM with {iterations:,} iterations" if iterations else ""
    cost = f"a log-in takes {duration(way.log_in_s)} and {duration(way.log_in_cpu_s)} of CPU here{scram}"
    figures = {
        "log_in_s": way.log_in_s,
        "log_in_cpu_s": way.log_in_cpu_s,
        "scram_iterations": iterations,
        "rate": rate,
    }
    if rate is None:
        most = f"; one core does {1 / way.log_in_cpu_s:,.0f} in a second" if way.log_in_cpu_s else ""
        return ok(cost + most, **figures)
    cores = rate * way.log_in_cpu_s
    severity = (
        Severity.CRITICAL
        if cores > _CORE_CRITICAL * facts.host.cpus
        else Severity.WARNING
        if cores > _CORE_WARN
        else Severity.OK
    )
    return graded(
        severity,
        f"{cost}; {rate:,.4g} in a second are {cores:,.2g} of {facts.host.cpus} cores",
        "Programs that open a connection for each request spend this before the first query, on their side; and "
        "the server starts a process for each.",
        "Keep connections in a pool. Do not lower scram_iterations for speed: they protect stolen verifiers.",
        {**figures, "cores": cores, "cpus": facts.host.cpus},
    )


def _iterations(facts: Facts) -> int | None:
    """Of the log-in, as far as it can be told; 4096 are built into the servers before 16."""
    if not facts.server.way.used_password:
        return None
    if facts.server.most_iterations is not None:
        return facts.server.most_iterations
    if facts.server.settings.get("password_encryption") != "scram-sha-256":
        return None
    return int(facts.server.number("scram_iterations") or 4096)


def password_encryption(facts: Facts) -> Verdict:
    """How the server stores new passwords, and whether md5 ones are left."""
    form = str(facts.server.settings.get("password_encryption", ""))
    left = facts.server.md5_secrets
    said = f"password_encryption = {form}"
    if left is None:
        said += "; who has md5 is not ours to see"
    else:
        said += f", {left:,} {'role has' if left == 1 else 'roles have'} an md5 password"
    if form in ("scram-sha-256", "") and not left:
        return ok(said, password_encryption=form, md5_roles=left)
    return warning(
        said,
        "An md5 password can be replayed by who reads the verifier, and PostgreSQL 18 warns of its removal.",
        "password_encryption = 'scram-sha-256', and set the passwords again; drivers from before 2018 cannot.",
        password_encryption=form,
        md5_roles=left,
    )


def tls(facts: Facts) -> Verdict:
    """Whether the way is encrypted, and whether the other end is proven."""
    way = facts.server.way
    figures = {"tls": way.tls or None, "cipher": way.cipher or None, "sslmode": way.sslmode, "way": way.kind}
    if way.tls in _OLD_TLS:
        return warning(
            f"{way.tls} with {way.cipher}",
            "This version of TLS is broken, and current libraries refuse it.",
            "ssl_min_protocol_version = 'TLSv1.2' (the default since PostgreSQL 12), and a libpq that has it.",
            **figures,
        )
    if way.tls:
        said = f"{way.tls} with {way.cipher}, sslmode = {way.sslmode}" if way.cipher else f"TLS {way.tls}"
        if way.kind == "network" and way.sslmode not in ("verify-ca", "verify-full"):
            return note(
                said,
                "Who answers is not checked: whoever sits on the way may pass for the server.",
                "sslmode=verify-full with sslrootcert=system, or the certificate of your authority.",
                **figures,
            )
        return ok(said, **figures)
    if way.kind != "network":
        return ok(f"without TLS, on this machine only ({way.kind})", **figures)
    return warning(
        f"without TLS over the network, sslmode = {way.sslmode}",
        "Queries and rows can be read on the way, and changed.",
        "ssl = on at the server, sslmode=verify-full here; with a pool its handshake is paid once for each "
        "connection, not for each request.",
        **figures,
    )


def keepalive_client(facts: Facts) -> Verdict:
    """When our end finds out that the server has gone without a word."""
    way = facts.server.way
    if way.kind == "socket":
        return ok("a Unix socket: the kernel tells at once")
    idle, interval, count = way.keepalive_idle_s, way.keepalive_interval_s, way.keepalive_count
    if idle is None or interval is None or count is None:
        dead = None
        said = "TCP keep-alive is off on our end"
    else:
        dead = idle + interval * count
        said = f"a dead server is noticed after {span(dead)} (idle {idle:g} s + {count} x {interval:g} s)"
    figures = {"dead_peer_s": dead, "idle_s": idle, "interval_s": interval, "count": count,
               "user_timeout_s": way.user_timeout_s}  # fmt: skip
    if facts.local or (dead is not None and dead <= _DEAD_PEER_S):
        return ok(said, **figures)
    return note(
        said,
        "A query on a connection that a firewall has dropped, or whose server has vanished, hangs for so long; "
        "load balancers forget idle connections after 4 to 6 minutes.",
        "keepalives_idle=60 keepalives_interval=10 keepalives_count=3 in the URL; tcp_user_timeout=30000 where "
        "queries answer soon.",
        **figures,
    )


def keepalive_server(facts: Facts) -> Verdict:
    """When the server finds out that a client has gone without a word."""
    way = facts.server.way
    idle, interval, count = (
        facts.server.number(f"tcp_keepalives_{name}") for name in ("idle", "interval", "count")
    )
    if way.kind == "socket" or not idle or interval is None or count is None:
        return not_known("the server tells this only over TCP", "Connect by host name or address.")
    dead = idle + interval * count
    said = f"a dead client is noticed after {span(dead)} (idle {idle:g} s + {count:g} x {interval:g} s)"
    figures = {"dead_peer_s": dead, "idle_s": idle, "interval_s": interval, "count": count}
    if facts.local or dead <= _DEAD_PEER_S:
        return ok(said, **figures)
    return note(
        said,
        "So long a client that vanished keeps its slot, its transaction and its locks.",
        "tcp_keepalives_idle = 60, tcp_keepalives_interval = 10, tcp_keepalives_count = 3 at the server; "
        "client_connection_check_interval = 10s ends a running query of a client that is gone.",
        **figures,
    )


def statement_timeout(facts: Facts) -> Verdict:
    """Whether a query may run for ever."""
    return _bound(
        facts,
        ("statement_timeout", "transaction_timeout"),
        "A query without an end keeps its connection, and a pool of N is empty after N of them.",
        "ALTER ROLE ... SET statement_timeout for programs that answer people; leave it off for maintenance.",
    )


def idle_in_transaction_timeout(facts: Facts) -> Verdict:
    """Whether a forgotten transaction is ended."""
    return _bound(
        facts,
        ("idle_in_transaction_session_timeout", "transaction_timeout"),
        "A program that forgets to commit keeps its slot and its locks until it ends.",
        "ALTER ROLE ... SET idle_in_transaction_session_timeout = '60s'; or the proxy's idle_transaction_timeout.",
    )


def _bound(facts: Facts, names: tuple[str, ...], consequence: str, remedy: str) -> Verdict:
    values = {name: value for name in names if (value := facts.server.number(name)) is not None}
    said = ", ".join(f"{name} = {span(value) if value else 'off'}" for name, value in values.items())
    figures = {f"{name}_s": value for name, value in values.items()}
    if any(values.values()):
        return ok(said, **figures)
    return note(said, consequence, remedy, **figures)


def idle_session_timeout(facts: Facts) -> Verdict:
    """Whether the server closes idle connections under the pools."""
    value = facts.server.number("idle_session_timeout")
    if value is None:
        return ok("this version has none")
    if not value:
        return ok("idle_session_timeout = off", idle_session_timeout_s=0.0)
    said = f"idle_session_timeout = {span(value)}"
    if value > _POOL_IDLE_S:
        return ok(said, idle_session_timeout_s=value)
    return warning(
        said,
        f"The server closes what a pool keeps idle (by default for {_POOL_IDLE_S:g} s, its minimum for longer): "
        "connections have to be opened anew, and a pool that does not look meets them dead.",
        "Leave it off for roles that programs use (ALTER ROLE ... SET idle_session_timeout = 0), and let "
        "idle_timeout of the pool be the shorter one.",
        idle_session_timeout_s=value,
    )


def dns_ttl(facts: Facts) -> Verdict:
    """How long the answer for the server's name holds."""
    if facts.name is None:
        return ok("addressed without a name")
    looked = f"; looking it up takes {duration(facts.lookup_s)}" if facts.lookup_s is not None else ""
    if facts.name.ttl_s is None:
        return not_known(f"time to live of {facts.target.host}: {facts.name.why}{looked}", lookup_s=facts.lookup_s)
    ttl = facts.name.ttl_s
    said = f"{facts.target.host} may change after {ttl} s{looked}"
    figures = {"ttl_s": ttl, "lookup_s": facts.lookup_s, "name_server": facts.name.asked}
    # A cached answer shows what is left of its time: the whole may be longer, not shorter.
    if ttl >= _SHORT_TTL_S:
        return ok(said, **figures)
    return note(
        said,
        "So short a time is for moving the name at a failover. Connections that are open stay where they are: on "
        "the old server, perhaps now read-only, until they are closed; and most programs look the name up again "
        "for each new connection.",
        "Keep max_lifetime of the pools in minutes, and let no resolver cache for longer than that.",
        **figures,
    )


def clock(facts: Facts) -> Verdict:
    """The server's clock against ours."""
    way = facts.server.way
    off = abs(way.clock_s)
    surely = max(0.0, off - way.clock_error_s)
    direction = "ahead of" if way.clock_s > 0 else "behind"
    said = f"the server is {span(off)} {direction} this machine (± {duration(way.clock_error_s)})"
    figures = {"clock_s": way.clock_s, "error_s": way.clock_error_s, "round_trip_s": way.round_trip_s}
    severity = (
        Severity.CRITICAL
        if surely > _CLOCK_CRITICAL_S
        else Severity.WARNING
        if surely > _CLOCK_WARN_S
        else Severity.OK
    )
    return graded(
        severity,
        said,
        "now() differs from the programs' clocks: deadlines, tokens and log lines do not match, and passwords "
        "with VALID UNTIL and certificates expire at another time than expected.",
        "Let both machines follow NTP (chronyc tracking, timedatectl).",
        dict(figures),
    )


def round_trip(facts: Facts) -> Verdict:
    """What each step with the server costs."""
    way = facts.server.way
    times = way.log_in_s / way.round_trip_s
    said = f"{duration(way.round_trip_s)}; opening a connection takes {times:,.0f} times that"
    return ok(said, round_trip_s=way.round_trip_s, log_in_s=way.log_in_s)
