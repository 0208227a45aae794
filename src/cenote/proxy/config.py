"""The daemon's options, each declared once; those of its pools are `cenote.config`'s, with the proxy's defaults.

Wrong values are problems, told all together, with the key path, the value and what is allowed. Nothing is
repaired silently, no type is converted, and nothing is read from the environment here.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator

from cenote.config import Option, PoolOptions
from cenote.errors import ConfigError
from cenote.proxy.problems import problems_between, told

# Options of the library's pools that the daemon has no use for.
_NOT_HERE = frozenset(("leak_after", "peek_after", "reset"))
#: Name, secret, whether it may log in, how many seconds the secret is valid yet.
AUTH_QUERY = (
    "SELECT rolname, rolpassword, rolcanlogin,"
    " EXTRACT(epoch FROM rolvaliduntil) - EXTRACT(epoch FROM pg_catalog.now())"
    " FROM pg_catalog.pg_authid WHERE rolname = $1"
)
_DEFAULTS: dict[str, Any] = {"acquire_timeout": 120.0}


class Model(BaseModel):
    """What all sections have in common: unknown keys are errors, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


FilePath = Annotated[Path, Field(strict=False)]


def _bounds(option: Option) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if option.low != float("-inf"):
        found["gt" if option.above else "ge"] = option.low
    if option.high != float("inf"):
        found["le"] = option.high
    return found


def _pool_fields() -> dict[str, Any]:
    """The pool options as fields of a section: all may be left out."""
    made: dict[str, Any] = {}
    types = {"int": int, "float": float, "str": str}
    for field in dataclasses.fields(PoolOptions):
        if field.name in _NOT_HERE:
            continue
        option: Option = field.metadata["option"]
        kind: Any = types[str(field.type).split(" |", maxsplit=1)[0]]
        if option.choices:
            kind = Literal[option.choices]
        extra: Any = {"unit": option.unit, "reloadable": option.reloadable}
        made[field.name] = (
            kind | None,
            Field(default=None, description=option.text, json_schema_extra=extra, **_bounds(option)),
        )
    return made


class _OwnPoolOptions(Model):
    mode: Literal["transaction", "session", "statement"] | None = Field(
        default=None, description="when a client gives its server connection back"
    )
    observe: bool | None = Field(
        default=None,
        description="dry run, in session mode: count what transaction mode would carry, pin or refuse",
    )
    wait_notice: float | None = Field(
        default=None,
        ge=0,
        description="tell a client that waits for longer; 0 does not",
        json_schema_extra={"unit": "seconds"},
    )
    cleanup_timeout: float | None = Field(
        default=None,
        gt=0,
        description="how long to cancel, drain and roll back what a client left behind; then it is closed",
        json_schema_extra={"unit": "seconds"},
    )
    max_prepared: int | None = Field(
        default=None, ge=1, le=100_000, description="prepared statements kept on one server connection"
    )
    max_pinned: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="clients that may keep a server connection at once; none: max_size - 1, at least 1",
    )
    unsafe: Literal["pin", "refuse"] | None = Field(
        default=None,
        description="what becomes of a statement that ties its client to a server connection",
    )
    audit: Literal["first", "always", "off"] | None = Field(
        default=None,
        description="ask the server whether a session is what it is taken for: after texts that are new and do"
        " more than they show, always, or never",
    )
    application_name_add_host: bool | None = Field(
        default=None,
        description="add the client's address to its application_name; the server connections are then set anew"
        " for each client",
    )
    query_timeout: float | None = Field(
        default=None,
        gt=0,
        description="cancel what runs for longer; none: never",
        json_schema_extra={"unit": "seconds"},
    )
    idle_transaction_timeout: float | None = Field(
        default=None,
        gt=0,
        description="end a client that idles in a transaction for longer; none: never",
        json_schema_extra={"unit": "seconds"},
    )


_OWN_DEFAULTS: dict[str, Any] = {
    "mode": "transaction",
    "observe": False,
    "wait_notice": 5.0,
    "cleanup_timeout": 5.0,
    "max_prepared": 200,
    "max_pinned": None,
    "unsafe": "pin",
    "audit": "first",
    "application_name_add_host": False,
    "query_timeout": None,
    "idle_transaction_timeout": None,
}

#: A section with pool options, each of which may be left out.
PoolSection: Any = create_model("PoolSection", __base__=_OwnPoolOptions, **_pool_fields())


class Listen(Model):
    """Where clients come in."""

    host: str = Field(default="127.0.0.1", description="addresses to listen on, separated by commas")
    port: int = Field(default=6432, ge=0, le=65535, description="the port; 0 takes a free one")
    unix_dir: str | None = Field(default=None, description="directory of a Unix socket, beside the addresses")
    tls_cert: FilePath | None = Field(default=None, description="certificate (chain) for clients, PEM")
    tls_key: FilePath | None = Field(default=None, description="its key, PEM; none: it stands in tls_cert")
    tls_mode: Literal["disable", "allow", "require"] = Field(
        default="allow", description="whether clients may, or must, use TLS"
    )
    tls_ca: FilePath | None = Field(
        default=None, description="authorities that sign the certificates of clients, PEM; none: none is asked for"
    )
    proxy_protocol_from: list[str] = Field(
        default_factory=list,
        description="networks of load balancers whose connections begin with a PROXY protocol header, or `unix`",
    )
    login_rate: float = Field(
        default=500.0,
        gt=0,
        description="log-ins admitted in a second; the others wait their turn",
        json_schema_extra={"unit": "per second"},
    )
    max_logins: int = Field(
        default=1000, ge=1, le=1_000_000, description="log-ins under way at once; one more ends the slowest"
    )
    login_timeout: float = Field(
        default=60.0, gt=0, description="how long a log-in may take", json_schema_extra={"unit": "seconds"}
    )
    max_clients: int = Field(
        default=10_000, ge=1, le=1_000_000, description="clients connected at once; one more is refused"
    )


class _Caps(Model):
    """What all pools of one database, or of one user, may have together."""

    max_clients: int | None = Field(default=None, ge=1, description="its clients connected at once; none: no cap")
    max_connections: int | None = Field(
        default=None, ge=1, description="its server connections, over all pools; none: no cap"
    )


class Server(Model):
    """How many of a server's connections are ours, over all its databases and users."""

    max_connections: int | None = Field(
        default=None,
        ge=1,
        description="so many, whatever the server says; none: max_connections_percent of its own",
    )
    max_connections_percent: float = Field(
        default=70.0,
        gt=0,
        le=100,
        description="share of the server's max_connections, without those it reserves",
        json_schema_extra={"unit": "percent"},
    )
    max_idle_percent: float = Field(
        default=50.0,
        ge=0,
        le=100,
        description="share that may be idle; above it the longest idle are closed",
        json_schema_extra={"unit": "percent"},
    )
    floor: int = Field(
        default=1, ge=0, le=1000, description="server connections that each pool gets whatever the others want"
    )


class Database(PoolSection, _Caps):  # type: ignore[misc]
    """A database that clients may ask for, and where it is."""

    host: str = Field(
        default="127.0.0.1", description="hosts, separated by commas, or the directory of a Unix socket"
    )
    port: int | str = Field(default=5432, description="the port, or one for each host, separated by commas")
    dbname: str | None = Field(default=None, description="its name at the server; none: the same")
    user: str | None = Field(default=None, description="the role to log in as; none: the client's own")
    password: str | None = Field(
        default=None, description="its password; none: what is known of the client's user"
    )
    sslmode: Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"] = Field(
        default="prefer", description="TLS to the server, as libpq has it"
    )
    sslrootcert: str | None = Field(default=None, description="the certificates that are trusted")
    sslcert: str | None = Field(default=None, description="our certificate, where the server asks for one")
    sslkey: str | None = Field(default=None, description="its key")
    sslnegotiation: Literal["postgres", "direct"] = Field(
        default="postgres", description="ask for TLS, or begin with it"
    )

    auth_user: str | None = Field(default=None, description="who looks users up here; none: the general one")
    auth_query: str | None = Field(default=None, description="how; none: the general one")
    auth_dbname: str | None = Field(default=None, description="in which database of the server; none: this one")

    @field_validator("port", mode="before")
    @classmethod
    def _ports(cls, port: Any) -> Any:
        words = port.split(",") if isinstance(port, str) else [str(port)]
        for word in words:
            if isinstance(port, (bool, float)) or not word.strip().isdecimal() or not 1 <= int(word) <= 65535:
                raise ValueError(
                    f"{port!r}: allowed is 1 to 65,535, or one port for each host, separated by commas"
                )
        return port


class User(PoolSection, _Caps):  # type: ignore[misc]
    """Who may log in."""

    password: str | None = Field(default=None, description="plain, md5..., or a SCRAM-SHA-256$ verifier")
    server_password: str | None = Field(
        default=None, description="to log in at the server, where password is a verifier"
    )
    auth: Literal["scram-sha-256", "md5", "password", "trust"] | None = Field(
        default=None, description="other than the general one"
    )


class Config(Model):
    """Everything the daemon is told."""

    listen: Listen = Listen()
    auth: Literal["scram-sha-256", "md5", "password", "trust"] = Field(
        default="scram-sha-256", description="how clients log in"
    )
    rules_file: FilePath | None = Field(
        default=None, description="rules of the form of pg_hba.conf; with them `auth` decides nothing"
    )
    map_file: FilePath | None = Field(default=None, description="user name maps of the form of pg_ident.conf")
    users_file: FilePath | None = Field(
        default=None, description='users beside [users], lines of the form "user" "password or verifier"'
    )
    auth_user: str | None = Field(
        default=None, description="the role that looks up at the server who is not configured; none: nobody is"
    )
    auth_query: str = Field(default=AUTH_QUERY, description="how it does: $1 is the user's name")
    pool: PoolSection = PoolSection()
    server: Server = Server()
    servers: dict[str, Server] = Field(default_factory=dict, description="by host:port, where other than [server]")
    databases: dict[str, Database] = Field(default_factory=dict, description="by the name clients ask for")
    users: dict[str, User] = Field(default_factory=dict, description="by name")
    admin_users: list[str] = Field(
        default_factory=list, description="who may log in to the virtual database `cenote`"
    )
    metrics_host: str = Field(default="127.0.0.1", description="where the metrics are served")
    metrics_port: int | None = Field(
        default=None, ge=0, le=65535, description="port of the metrics, 0 takes a free one; none: not served"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="what is logged: this and what is graver"
    )
    log_format: Literal["text", "json"] = Field(default="text", description="a line for people, or an object")


@dataclasses.dataclass(frozen=True, slots=True)
class ProxyPoolOptions:
    """The options of one pool, merged."""

    mode: str
    min_size: int
    max_size: int
    acquire_timeout: float
    max_waiting: int
    idle_timeout: float
    max_lifetime: float
    check_after: float
    connect_timeout: float
    codel: str
    init_query: str | None
    observe: bool
    wait_notice: float
    cleanup_timeout: float
    max_prepared: int
    max_pinned: int | None
    unsafe: str
    audit: str
    application_name_add_host: bool
    query_timeout: float | None
    idle_transaction_timeout: float | None


def pool_defaults() -> dict[str, Any]:
    """What an option of a pool is where no section has it."""
    values = {field.name: _DEFAULTS.get(field.name, field.default) for field in dataclasses.fields(PoolOptions)}
    values.update(_OWN_DEFAULTS)
    return {field.name: values[field.name] for field in dataclasses.fields(ProxyPoolOptions)}


def pool_options(config: Config, database: str, user: str) -> ProxyPoolOptions:
    """The options of one pool: [pool], then the database's, then the user's.

    `min_size` has its default, or `max_size` where only that is given and smaller.
    """
    values = pool_defaults()
    given: set[str] = set()
    for section in (config.pool, config.databases.get(database), config.users.get(user)):
        for name in values if section is not None else ():
            value = getattr(section, name)
            if value is not None:
                values[name] = value
                given.add(name)
    if "min_size" not in given:
        values["min_size"] = min(values["min_size"], values["max_size"])
    return ProxyPoolOptions(**values)


def pool_names(config: Config) -> list[tuple[str, str]]:
    """The pools that are known by name: for each database its users, or the one it logs in as.

    A client of a database that logs in as somebody else has a pool of its own as well, from when it comes.
    """
    return [(database, user) for database in config.databases for user in config.users]


def config_of(values: Mapping[str, Any], *, file: str = "", complete: bool = False) -> Config:
    """A configuration from nested tables.

    :param file: named in each problem
    :param complete: what can be told only of a whole configuration is a problem too: users that cannot log in,
        certificates that cannot be read, nothing to serve
    :raises ConfigError: with every problem.
    """
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError([_placed(file, told(problem, Config)) for problem in error.errors()]) from None
    problems = problems_between(config, pool_options, complete=complete)
    if problems:
        raise ConfigError([_placed(file, problem) for problem in problems])
    return config


def read_tables(path: Path | str) -> dict[str, Any]:
    """The tables of a TOML file, unchecked.

    :raises ConfigError: it cannot be read, or is no TOML; with line and column.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: not TOML: {error}"]) from None


def load_config(path: Path | str) -> Config:
    """A configuration from a TOML file, checked as a whole.

    :raises ConfigError: with every problem; for a syntax error its line and column.
    """
    return config_of(read_tables(path), file=str(path), complete=True)


def _placed(file: str, problem: str) -> str:
    return f"{file}: {problem}" if file else problem
