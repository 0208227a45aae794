"""The doctor's rules about the kernels: ports, open files, processes, the queues of listening sockets.

Limits of the host are this machine's; the server's own are known only where it runs here. Pure functions from
facts to verdicts; each is known by its name, which docs/doctor.md explains.
"""

from cenote.measure.doctor_facts import Facts
from cenote.measure.findings import percent
from cenote.measure.verdict import Severity, Verdict, critical, graded, not_known, note, ok, warning

_TIME_WAIT_S = 60  # TCP_TIMEWAIT_LEN of Linux, not a setting
_PORTS_WARN, _PORTS_CRITICAL = 0.5, 0.9
_SPARE_FILES = 64
_SERVER_OTHERS = 30  # processes of a server that serve no client
_DAY_S = 86_400.0


def ephemeral_ports(facts: Facts) -> Verdict:
    """How many connections to one server this machine can open in a second, for its ports."""
    ports = facts.host.ports
    if facts.server.way.kind == "socket":
        return ok("a Unix socket needs no port")
    if ports is None:
        return not_known("/proc/sys/net/ipv4/ip_local_port_range cannot be read here")
    rate, figures = facts.programs.rate, {"ports": ports, "time_wait_s": _TIME_WAIT_S}
    lasting = ports / _TIME_WAIT_S
    said = f"{ports:,} ports for connections to one address and port, {lasting:,.0f} new ones in a second at most"
    if facts.local:
        return ok(f"{ports:,} ports; not judged, the server is on this machine", **figures)
    if facts.host.tw_reuse == 1:
        return ok(f"{ports:,} ports, and tcp_tw_reuse = 1 takes one again after a second", **figures)
    figures = {**figures, "most_per_s": round(lasting)}
    if rate is None:
        return ok(said, **figures)
    share = rate * _TIME_WAIT_S / ports
    return graded(
        _by_ports(share),
        f"{rate:,.4g} connections in a second keep {rate * _TIME_WAIT_S:,.0f} of {ports:,} ports in TIME_WAIT",
        "Who closes a connection keeps its port for 60 s. When they are gone connect() fails with EADDRNOTAVAIL, "
        '"Cannot assign requested address", and nearly there it gets slow.',
        "Keep connections in a pool; that is the cure. Meanwhile net.ipv4.ip_local_port_range = 1024 65535, and "
        "net.ipv4.tcp_tw_reuse = 1 (never tcp_tw_recycle; tcp_fin_timeout changes nothing here).",
        {**figures, "rate": rate},
    )


def time_wait(facts: Facts) -> Verdict:
    """Ports that are in TIME_WAIT towards the server now."""
    count, ports = facts.host.time_wait, facts.host.ports
    if facts.server.way.kind == "socket":
        return ok("a Unix socket knows no TIME_WAIT")
    if count is None or not ports:
        return not_known("/proc/net/tcp cannot be read here")
    figures = {"time_wait": count, "ports": ports}
    if facts.local:
        return ok(f"{count:,} sockets; not judged, the server is on this machine", **figures)
    return graded(
        _by_ports(count / ports),
        f"{count:,} of {ports:,} ports to the server are in TIME_WAIT ({percent(count, ports)})",
        f"Programs here close some {count / _TIME_WAIT_S:,.0f} connections to it in a second; as many again and "
        "connect() fails.",
        "Find who opens a connection for each request, and give him a pool.",
        dict(figures),
    )


def _by_ports(share: float) -> Severity:
    if share >= _PORTS_CRITICAL:
        return Severity.CRITICAL
    return Severity.WARNING if share >= _PORTS_WARN else Severity.OK


def open_files(facts: Facts) -> Verdict:
    """`ulimit -n` against a pool, or against the proxy's clients."""
    soft, hard, proxy = facts.host.files_soft, facts.host.files_hard, facts.proxy
    if soft is None:
        return ok("without a limit")
    figures = {"soft": soft, "hard": hard}
    if proxy is not None and proxy.known:
        needed = proxy.max_clients + proxy.most + _SPARE_FILES
        figures["needed"] = needed
        said = f"{hard if hard is not None else 'any number of'} files may be open, the proxy needs {needed:,}"
        if hard is not None and needed > hard:
            return warning(
                said,
                f"With max_clients = {proxy.max_clients:,} the daemon runs out of files before it refuses clients "
                "with a word. (It raises its limit to the hard one itself.)",
                "LimitNOFILE= of its unit, or ulimit -Hn; or a lower max_clients.",
                **figures,
            )
        return ok(said, **figures)
    size = facts.programs.pool_size
    if size is not None and size + _SPARE_FILES > soft:
        return critical(
            f"a process may open {soft:,} files, a pool of {size:,} needs {size + _SPARE_FILES:,}",
            'Connections fail with "Too many open files", and with them everything else that opens one.',
            f"ulimit -n {size + _SPARE_FILES:,} or more (LimitNOFILE= of the unit).",
            **figures,
        )
    return ok(f"a process may open {soft:,} files (ulimit -n)", **figures)


def server_files_and_processes(facts: Facts) -> Verdict:
    """The postmaster's own limits, against max_connections."""
    seen, ceiling = facts.server_host, facts.target.max_connections
    if seen is None:
        return not_known("the server's processes cannot be seen from here", "Run the doctor on its machine.")
    if not seen.limits_known:
        return not_known("its /proc/PID/limits may not be read", "Run the doctor as the server's user or root.")
    needed = ceiling + _SERVER_OTHERS
    files = f"{seen.files_soft:,}" if seen.files_soft is not None else "any number of"
    processes = f"{seen.processes:,}" if seen.processes is not None else "any number of"
    said = f"the server may have {processes} processes and {files} files in each, and needs {needed:,} processes"
    figures = {"processes": seen.processes, "files": seen.files_soft, "needed": needed}
    if seen.processes is not None and seen.processes < needed:
        return critical(
            said,
            'Before max_connections is reached the server cannot fork: "could not fork new process ...".',
            "LimitNPROC= (and TasksMax=) of its unit, or a lower max_connections.",
            **figures,
        )
    return ok(said, **figures)


def accept_queue(facts: Facts) -> Verdict:
    """How many connections may knock at once, before the kernel turns them away."""
    most, announced = facts.host.somaxconn, facts.announced
    if most is None:
        return not_known("/proc/sys/net/core/somaxconn cannot be read here")
    seen = facts.server_host
    if seen is None or seen.accept_length is None:
        said = f"somaxconn = {most:,} on this machine (for what listens here); the server's own is not known"
        length = most
    else:
        length = seen.accept_length
        bound = "somaxconn" if length >= most else f"as many as it asked for; somaxconn is {most:,}"
        said = f"the server's queue holds {length:,} ({bound}), {seen.accept_waiting or 0:,} in it now"
    raised = (
        "A higher net.core.somaxconn (and a restart of what listens), and"
        if length >= most
        else "The server's own bound, which follows max_connections; somaxconn changes nothing. What helps are"
    )
    figures = {"somaxconn": most, "queue": length, "waiting": seen.accept_waiting if seen else None,
               "announced": announced or None}  # fmt: skip
    if announced <= length and (seen is None or (seen.accept_waiting or 0) < length / 2):
        return ok(said, **figures)
    return warning(
        f"{said}; {announced:,} may come at once" if announced > length else said,
        "After a restart all pools dial at once. What finds the queue full is dropped without a word, and tries "
        "again after 1, 3, 7 s: it looks like a slow server.",
        f"{raised} pools that dial with a gate and a jittered back-off (ours do).",
        **figures,
    )


def accept_overflows(facts: Facts) -> Verdict:
    """Connections that were lost because a program here did not accept them in time."""
    count, up = facts.host.listen_overflows, facts.host.uptime_s
    if count is None:
        return not_known("/proc/net/netstat cannot be read here")
    grown = facts.overflows_now or 0
    figures = {"since_boot": count, "while_looking": grown, "uptime_s": up}
    days = f" in {up / _DAY_S:.1f} days" if up else ""
    said = (
        f"{count:,} since this machine started{days}, {grown:,} of them just now; of all programs that listen here"
    )
    consequence = "Each made a client wait a second or more before it tried again, unseen in any log."
    remedy = "ss -ltn shows which queue (Recv-Q) is full: accept faster, or raise somaxconn and its backlog."
    if grown:
        return warning(said, consequence, remedy, **figures)
    if count:
        return note(said, consequence, remedy, **figures)
    return ok(said, **figures)
