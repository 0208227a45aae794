"""The doctor's rules about slots: who has them, who may want them, what they cost the server.

Pure functions from facts to verdicts; each is known by its name, which docs/doctor.md explains.
"""

from cenote.measure.doctor_facts import Facts
from cenote.measure.findings import mebibytes, percent, span
from cenote.measure.verdict import Severity, Verdict, critical, graded, not_known, note, ok, warning

_USED_WARN, _USED_CRITICAL = 0.80, 0.95
_IDLE_LONG_S, _IDLE_OF_ALL, _IDLE_OF_SLOTS = 60.0, 0.5, 0.25
_IN_TRANSACTION_WARN_S, _IN_TRANSACTION_CRITICAL_S = 60.0, 600.0
_MEMORY_WARN = 0.75
_PAST_KNEE_CRITICAL = 4


def slots_used(facts: Facts) -> Verdict:
    """Of the slots an ordinary role may take, those that are taken now."""
    used, usable = facts.used, facts.usable
    share = used / usable
    severity = (
        Severity.CRITICAL if share >= _USED_CRITICAL else Severity.WARNING if share >= _USED_WARN else Severity.OK
    )
    return graded(
        severity,
        f"{used:,} of {usable:,} usable slots are taken ({percent(used, usable)})",
        f"After {max(0, usable - used):,} more connections the server refuses every further one with 53300.",
        "See who has them (--plot, or pg_stat_activity), close idle ones, and let programs share connections: a "
        "pool in each, or `cenote serve` before the server. Raising max_connections needs memory and a restart.",
        {"used": used, "usable": usable, "max_connections": facts.target.max_connections},
    )


def slots_overcommitted(facts: Facts) -> Verdict:
    """All that may connect, against the slots there are."""
    usable, announced, strangers = facts.usable, facts.announced, facts.strangers
    if not announced:
        return not_known(
            "how many connections your programs may open",
            "Say it: --pool-size with --instances and --workers, or --config for the proxy.",
            usable=usable,
        )
    figures = {"may_connect": announced + strangers, "announced": announced, "others": strangers, "usable": usable}
    left = max(0, usable - strangers)
    remedy = (
        f"Make instances x workers x pool size {left:,} at most, or put `cenote serve` between: it shares one "
        "budget over all clients."
        if facts.proxied is None
        else f"Make the proxy's budget {left:,} at most: its clients wait for a connection, and none is refused."
    )
    if announced + strangers <= usable:
        return ok(f"{announced + strangers:,} may connect, {usable:,} fit", **figures)
    if announced > usable:
        return critical(
            f"{announced:,} announced connections, {usable:,} fit",
            f"When all pools are full {announced - usable:,} connections are refused with 53300, others' too.",
            remedy,
            **figures,
        )
    own = "" if facts.programs.application else " If some of those are your own, say so with --application NAME."
    return warning(
        f"{announced:,} announced and {strangers:,} there now, {usable:,} fit",
        f"Beside those who are connected now the pools cannot fill: {announced + strangers - usable:,} too many."
        + own,
        remedy,
        **figures,
    )


def local_pools(facts: Facts) -> Verdict:
    """The pools of your programs alone, against the ceiling: the server's, or the proxy's where they go there."""
    programs, most = facts.programs, facts.programs.most
    if most is None:
        return not_known("the size of your pools", "Say it with --pool-size, --instances, --workers.")
    counted = f"{programs.instances:,} instances x {programs.workers:,} workers x {programs.pool_size:,}"
    if facts.proxied is not None:
        clients = facts.proxied.max_clients
        said = f"{counted} = {most:,} connections to the proxy, whose max_clients is {clients:,}"
        if most > clients:
            return critical(
                said,
                "The proxy refuses whoever comes beyond that.",
                f"max_clients = {most:,} or more in {facts.proxied.file}, or smaller pools.",
                connections=most,
                max_clients=clients,
            )
        return ok(said, connections=most, max_clients=clients)
    figures = {"connections": most, "usable": facts.usable}
    if most > facts.usable:
        each = facts.usable // (programs.instances * programs.workers)
        return critical(
            f"{counted} = {most:,} connections, {facts.usable:,} fit",
            "Each pool keeps to its own bound and their sum breaks the server's: under load some instances get "
            "connections and the others errors.",
            (f"Use a pool size of {each:,} or less, or let" if each else "Not even one connection each fits: let")
            + " the pools go through `cenote serve`, whose budget is one for all.",
            **figures,
        )
    return ok(f"{counted} = {most:,} connections, {facts.usable:,} fit", **figures)


def pools_past_knee(facts: Facts) -> Verdict:
    """Pools larger than the number of connections from which on the server gets no faster."""
    knee, announced = facts.programs.knee, facts.announced
    if knee is None:
        return not_known(
            "where this server gets no faster", "Measure it with `cenote size`, and give it as --knee."
        )
    if not announced:
        return not_known("the size of your pools", "Say it with --pool-size, --instances, --workers.", knee=knee)
    figures = {"announced": announced, "knee": knee}
    if announced <= knee:
        return ok(f"{announced:,} connections, the knee is at {knee:,}", **figures)
    severity = Severity.WARNING if announced <= _PAST_KNEE_CRITICAL * knee else Severity.CRITICAL
    return graded(
        severity,
        f"{announced:,} connections, the knee is at {knee:,}",
        "Beyond the knee more connections add no throughput: queries wait inside the server, where nothing "
        "bounds or sees the queue, and take longer the more there are.",
        f"Let the pools sum to about {knee:,}; callers then wait in the pool, in order and with a deadline.",
        dict(figures),
    )


def proxy_budget(facts: Facts) -> Verdict:
    """The budget of a configured `cenote serve`, against the slots that others leave."""
    proxy = facts.proxy
    if proxy is None:
        return not_known("no configuration of the proxy was given", "Give it with --config, if there is one.")
    if not proxy.known:
        return not_known(
            f"{proxy.file} has no database at {facts.target.host}:{facts.target.port}; "
            f"its servers: {', '.join(proxy.servers)}",
            "Examine the server of that file, under the same host and port as it stands there.",
        )
    left = facts.usable - facts.strangers
    figures = {"budget": proxy.budget, "pools": proxy.pools, "left_by_others": left, "usable": facts.usable}
    where = f" ({proxy.percent:g} % of {facts.usable:,})" if proxy.percent is not None else ""
    said = f"budget {proxy.budget:,}{where}, its pools sum to {proxy.pools:,}, others leave {left:,}"
    lower = "Lower max_connections or max_connections_percent under [server], or the others' pools."
    if proxy.most > facts.usable:
        return critical(
            said, "The proxy may ask for more than the server has, and is refused with 53300.", lower, **figures
        )
    if proxy.most > left:
        return warning(
            said,
            "With those who are connected now the proxy cannot use its budget: the server refuses it, and it "
            "then asks for less for a minute.",
            lower + " If those others are programs that will go through the proxy, this passes.",
            **figures,
        )
    if proxy.pools > proxy.budget:
        return note(
            said,
            "The pools cannot all be full at once; they share the budget, each according to its demand.",
            "Nothing, if that is meant; else raise the budget or lower max_size.",
            **figures,
        )
    return ok(said, **figures)


def reserved_slots(facts: Facts) -> Verdict:
    """The slots that are kept for operators."""
    kept = facts.server.number("superuser_reserved_connections") or 0
    reserved = facts.server.number("reserved_connections") or 0
    said = f"{kept:.0f} for superusers, {reserved:.0f} for pg_use_reserved_connections"
    figures = {"superuser_reserved_connections": int(kept), "reserved_connections": int(reserved)}
    if kept == 0:
        return warning(
            said,
            "When the slots are gone nobody can log in to see why or to end sessions.",
            "Set superuser_reserved_connections = 3 (the default); it needs a restart.",
            **figures,
        )
    return ok(said, **figures)


def superuser_login(facts: Facts) -> Verdict:
    """Programs that log in as a superuser eat the reserve."""
    if not facts.server.superuser:
        return ok(f"role {facts.target.user} is no superuser")
    return note(
        f"role {facts.target.user} is a superuser",
        "A program that logs in with it may also take the slots reserved for operators, and no check of rights "
        "holds it back.",
        "Fine for looking at the server; for programs use an ordinary role.",
    )


def role_limits(facts: Facts) -> Verdict:
    """CONNECTION LIMIT of our role and of this database."""
    limits = [
        (value, f"{kind} {name}")
        for value, kind, name in (
            (facts.server.role_limit, "role", facts.target.user),
            (facts.server.database_limit, "database", facts.target.database),
        )
        if value is not None
    ]
    if not limits or facts.server.superuser:
        return ok("no CONNECTION LIMIT that holds for this role and database")
    limit, whose = min(limits)
    said = f"{whose} may have {limit:,} connections"
    figures = {"limit": limit, "announced": facts.announced or None}
    if facts.announced > limit:
        return critical(
            f"{said}, {facts.announced:,} announced",
            'The rest is refused with "too many connections for" it, though the server has slots.',
            "ALTER ROLE or ALTER DATABASE ... CONNECTION LIMIT, or smaller pools.",
            **figures,
        )
    if facts.announced:
        return ok(f"{said}, {facts.announced:,} announced", **figures)
    return note(said, "Pools that sum to more are refused there, though the server has slots.",
                "Count it in when you choose pool sizes.", **figures)  # fmt: skip


def idle_sessions(facts: Facts) -> Verdict:
    """Sessions that hold a slot and do nothing."""
    hidden = _hidden(facts)
    if hidden is not None:
        return hidden
    ages = sorted(s.in_state_s for s in facts.server.sessions if s.state == "idle" and s.in_state_s is not None)
    count, used = len(ages), facts.used
    long = sum(age >= _IDLE_LONG_S for age in ages)
    figures = {"idle": count, "idle_long": long, "sessions": used, "longest_s": ages[-1] if ages else None}
    if not count:
        return ok("no idle session", **figures)
    said = (
        f"{count:,} of {used:,} sessions are idle, {long:,} of them for over {span(_IDLE_LONG_S)}, "
        f"the longest for {span(ages[-1])}"
    )
    if long / used > _IDLE_OF_ALL and long / facts.usable > _IDLE_OF_SLOTS:
        return warning(
            said,
            f"Those hold {percent(long, facts.usable)} of the slots and their memory, and the server's snapshots "
            "get dearer with each.",
            "Lower the minimum or idle timeout of the pools they belong to; where many small pools stand idle, "
            "one `cenote serve` before them needs a fraction.",
            **figures,
        )
    return ok(said, **figures)


def idle_in_transaction(facts: Facts) -> Verdict:
    """Sessions that opened a transaction and do nothing in it."""
    hidden = _hidden(facts)
    if hidden is not None:
        return hidden
    ages = sorted(facts.ages("idle in transaction"))
    longest = ages[-1] if ages else 0.0
    figures = {"sessions": len(ages), "longest_s": longest}
    if not ages:
        return ok("no session is idle in a transaction", **figures)
    severity = (
        Severity.CRITICAL
        if longest >= _IN_TRANSACTION_CRITICAL_S
        else Severity.WARNING
        if longest >= _IN_TRANSACTION_WARN_S
        else Severity.OK
    )
    return graded(
        severity,
        f"{len(ages):,} idle in transaction, the longest for {span(longest)}",
        "Each keeps its slot (a pooler cannot lend it on), its locks, and VACUUM from removing what has died "
        "since it began.",
        "Find what the program does between BEGIN and COMMIT; bound it with idle_in_transaction_session_timeout.",
        dict(figures),
    )


def _hidden(facts: Facts) -> Verdict | None:
    """Not known, where states of others are not shown to our role."""
    count = sum(session.state == "hidden" for session in facts.server.sessions)
    if not count:
        return None
    user = facts.target.user
    return not_known(
        f"the states of {count:,} of {facts.used:,} sessions are hidden from role {user}",
        f"GRANT pg_monitor TO {user}; or look as a role that has it.",
        hidden=count,
        sessions=facts.used,
    )


def memory(facts: Facts) -> Verdict:
    """Memory of a backend times the ceiling, and shared buffers, against what the machine has."""
    buffers = facts.server.number("shared_buffers") or 0.0
    ceiling, seen = facts.target.max_connections, facts.server_host
    if seen is None or seen.backend_bytes is None or seen.memory_bytes is None:
        why = _not_local(facts) if seen is None else "the memory of the server's processes cannot be read here"
        return not_known(why, "Run the doctor on the server's machine, as the server's user or root.")
    total = seen.backend_bytes * ceiling + buffers
    share = total / seen.memory_bytes
    source = "" if seen.backend_source == "smaps_rollup" else " at most"
    said = (
        f"{ceiling:,} x {mebibytes(seen.backend_bytes)}{source} + {mebibytes(buffers)} shared buffers = "
        f"{mebibytes(total)} of {mebibytes(seen.memory_bytes)} ({percent(int(total), seen.memory_bytes)})"
    )
    severity = Severity.CRITICAL if share > 1 else Severity.WARNING if share > _MEMORY_WARN else Severity.OK
    return graded(
        severity,
        said,
        "When all slots are taken the machine swaps or kills a backend, and one killed backend restarts all.",
        "Lower max_connections to what pools need, or make backends smaller: shorter lives, fewer prepared "
        "plans, fewer tables touched by each.",
        {
            "backend_bytes": seen.backend_bytes,
            "largest_bytes": seen.largest_bytes,
            "backends_seen": seen.backends,
            "ceiling": ceiling,
            "shared_buffers_bytes": int(buffers),
            "memory_bytes": seen.memory_bytes,
        },
    )


def work_memory(facts: Facts) -> Verdict:
    """If every connection sorts at once: work_mem times the ceiling, against the memory."""
    buffers, work = facts.server.number("shared_buffers") or 0.0, facts.server.number("work_mem") or 0.0
    has = facts.server_host.memory_bytes if facts.server_host is not None else None
    if has is None and facts.programs.server_memory is not None:
        has = int(facts.programs.server_memory * 2**30)
    if has is None:
        return not_known(_not_local(facts), "Say what its machine has with --server-memory.")
    ceiling = facts.target.max_connections
    total = ceiling * work + buffers
    said = (
        f"{ceiling:,} x work_mem {mebibytes(work)} + {mebibytes(buffers)} shared buffers = {mebibytes(total)} of "
        f"{mebibytes(has)}"
    )
    figures = {"work_mem_bytes": int(work), "ceiling": ceiling, "memory_bytes": has}
    if total <= has:
        return ok(said, **figures)
    return note(
        said,
        "If every connection sorted or hashed at once, once each, the memory would not do; a query may take "
        "work_mem several times.",
        f"Lower max_connections: with {int(max(0.0, has - buffers) // work) if work else 0:,} it fits. Or set "
        "work_mem high only for the queries that need it.",
        **figures,
    )


def _not_local(facts: Facts) -> str:
    if facts.local:
        return "the server's processes are not on this machine: a tunnel, a container or a pooler stands between"
    return "the server is on another machine"
