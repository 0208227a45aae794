"""What the doctor knows when it judges: the server, the way to it, this machine, and the user's programs.

Only facts; the judgements are functions of these.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from cenote.config import Option
from cenote.errors import ConfigError
from cenote.measure.dns import NameFacts
from cenote.measure.host import HostFacts, ServerHostFacts
from cenote.measure.target import Target


def _option(text: str, default: Any = None, **known: Any) -> Any:
    return field(default=default, metadata={"option": Option(text, **known)})


@dataclass(frozen=True, slots=True)
class Session:
    """One client session of somebody else. state: as in pg_stat_activity, "starting" or "hidden"."""

    pid: int
    user: str
    application: str
    state: str
    in_state_s: float | None = None
    transaction_s: float | None = None


@dataclass(frozen=True, slots=True)
class WayFacts:
    """The connection itself.

    kind: "socket", "loopback" (this machine's own address, too) or "network"
    address: of the server as a number; None for a socket
    tls: its version, "" without; cipher likewise
    keepalive_*: what the kernel does on our end; None: off, or there is none on a socket
    round_trip_s: the shortest of several; clock_s: server's clock minus ours, within clock_error_s
    log_in_s, log_in_cpu_s: the median of opening a connection, and the CPU time of this process in it
    used_password: whether the server asked for one
    pooler: a pooler answers for the server: its process numbers are not the server's
    """

    kind: str
    address: str | None
    sslmode: str
    tls: str
    cipher: str
    keepalive_idle_s: float | None
    keepalive_interval_s: float | None
    keepalive_count: int | None
    user_timeout_s: float | None
    round_trip_s: float
    clock_s: float
    clock_error_s: float
    log_in_s: float
    log_in_cpu_s: float
    used_password: bool
    pooler: bool


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What the server says. Settings: numbers in seconds or bytes where they have a unit, words as they are.

    role_limit, database_limit: connections of our role and of this database, None: without a limit
    sees_all: whether the states of other roles' sessions are shown to us
    md5_secrets, most_iterations: of pg_authid; None: not ours to see
    """

    settings: dict[str, float | str]
    sessions: tuple[Session, ...]
    superuser: bool
    role_limit: int | None
    database_limit: int | None
    sees_all: bool
    md5_secrets: int | None
    most_iterations: int | None
    way: WayFacts

    def number(self, name: str) -> float | None:
        """A setting that is a number; None where this version has none of that name."""
        value = self.settings.get(name)
        return value if isinstance(value, float) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """What the user's programs may open, as he says. None: he did not.

    :raises ConfigError: from `check`, naming every problem
    """

    instances: int = _option("instances of your program", 1, low=1, high=100_000)
    workers: int = _option("processes of each instance that have a pool of their own", 1, low=1, high=10_000)
    pool_size: int | None = _option("connections of each pool, at most", low=1, high=100_000, none_means="none")
    rate: float | None = _option(
        "connections opened in a second", low=0, above=True, high=1_000_000, none_means="none"
    )
    knee: int | None = _option(
        "connections beyond which this server gets no faster, from `cenote size`",
        low=1,
        high=100_000,
        none_means="none",
    )
    server_memory: float | None = _option(
        "memory of the server's machine, where it is another", low=0, above=True, unit="GiB", none_means="none"
    )
    application: str | None = _option("what your own sessions have as application_name", none_means="none")

    def check(self) -> None:
        problems = []
        for f in fields(self):
            option: Option = f.metadata["option"]
            kind = "int" if f.type in (int, int | None) else "float" if f.type == float | None else "str"
            problem = option.problem(f.name, getattr(self, f.name), kind)
            if problem:
                problems.append(problem)
        if self.pool_size is None and (self.instances > 1 or self.workers > 1):
            problems.append("instances and workers say something only together with pool_size: give that too")
        if problems:
            raise ConfigError(problems)

    @property
    def most(self) -> int | None:
        """All they may open together."""
        return None if self.pool_size is None else self.instances * self.workers * self.pool_size


@dataclass(frozen=True, slots=True)
class ProxyFacts:
    """What a configuration of `cenote serve` makes of this server.

    known: whether one of its databases is on this server; the rest counts only then
    servers: where its databases are, by name
    budget: server connections it may open; percent: the share that makes them, None: a plain number
    pools: the max_size of its pools here, together; max_clients: of the daemon
    """

    file: str
    known: bool
    servers: tuple[str, ...]
    budget: int = 0
    percent: float | None = None
    pools: int = 0
    max_clients: int = 0

    @property
    def most(self) -> int:
        """What it will open: neither beyond its budget nor beyond its pools."""
        return min(self.budget, self.pools)


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything at one moment.

    server_host: None: the server's processes cannot be seen from here
    name: None: the server was not addressed by a name; lookup_s: resolving it as programs do
    overflows_now: connections that this machine's listening programs lost while we looked
    """

    target: Target
    server: ServerFacts
    host: HostFacts
    server_host: ServerHostFacts | None = None
    name: NameFacts | None = None
    lookup_s: float | None = None
    overflows_now: int | None = None
    programs: Programs = Programs()
    proxy: ProxyFacts | None = None

    @property
    def usable(self) -> int:
        """Slots that an ordinary role may take."""
        return self.target.max_connections - self.target.reserved

    @property
    def used(self) -> int:
        """Sessions of others, now."""
        return len(self.server.sessions)

    @property
    def strangers(self) -> int:
        """Sessions of others that are not the user's programs', as far as their name is known."""
        own = self.programs.application
        return sum(own is None or session.application != own for session in self.server.sessions)

    @property
    def local(self) -> bool:
        """Whether connections stay on this machine (a tunnel's near end would, too)."""
        return self.server.way.kind != "network"

    @property
    def announced(self) -> int:
        """What the user says may come: his programs, or the proxy that they connect to."""
        return self.proxied.most if self.proxied is not None else self.programs.most or 0

    @property
    def proxied(self) -> ProxyFacts | None:
        """The proxy, where the user's configuration has one before this server."""
        return self.proxy if self.proxy is not None and self.proxy.known else None

    def ages(self, state: str) -> Iterator[float]:
        """How long each session has been in this state, in seconds, where that is shown."""
        for session in self.server.sessions:
            if session.state.startswith(state) and session.in_state_s is not None:
                yield session.in_state_s
