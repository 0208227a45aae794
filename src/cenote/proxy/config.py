"""The daemon's options, each declared once; those of its pools are `cenote.config`'s, with the proxy's defaults.

Wrong values are problems, told all together, with the key path, the value and what is allowed. Nothing is
repaired silently, and nothing is read from the environment here.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from cenote.config import Option, PoolOptions
from cenote.errors import ConfigError

#: The virtual database that answers SHOW.
CONSOLE = "cenote"

# Options of the library's pools that the daemon has no use for.
_NOT_HERE = frozenset(("leak_after", "peek_after", "reset"))
_DEFAULTS: dict[str, Any] = {"acquire_timeout": 120.0}


class Model(BaseModel):
    """What all sections have in common: unknown keys are errors, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


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
        extra = {"unit": option.unit, "reloadable": option.reloadable}
        made[field.name] = (
            kind | None,
            Field(None, description=option.text, json_schema_extra=extra, **_bounds(option)),
        )
    return made


class _OwnPoolOptions(Model):
    mode: Literal["transaction", "session", "statement"] | None = Field(
        None, description="when a client gives its server connection back"
    )
    wait_notice: float | None = Field(
        None,
        ge=0,
        description="tell a client that waits for longer; 0 does not",
        json_schema_extra={"unit": "seconds"},
    )
    cleanup_timeout: float | None = Field(
        None,
        gt=0,
        description="how long to cancel, drain and roll back what a client left behind, before the connection is closed",
        json_schema_extra={"unit": "seconds"},
    )
    max_prepared: int | None = Field(
        None, ge=1, le=100_000, description="prepared statements kept on one server connection"
    )
    query_timeout: float | None = Field(
        None, gt=0, description="cancel what runs for longer; none: never", json_schema_extra={"unit": "seconds"}
    )
    idle_transaction_timeout: float | None = Field(
        None,
        gt=0,
        description="end a client that idles in a transaction for longer; none: never",
        json_schema_extra={"unit": "seconds"},
    )


_OWN_DEFAULTS: dict[str, Any] = {
    "mode": "transaction",
    "wait_notice": 5.0,
    "cleanup_timeout": 5.0,
    "max_prepared": 200,
    "query_timeout": None,
    "idle_transaction_timeout": None,
}

#: A section with pool options, each of which may be left out.
PoolSection: Any = create_model("PoolSection", __base__=_OwnPoolOptions, **_pool_fields())


class Listen(Model):
    """Where clients come in."""

    host: str = Field("127.0.0.1", description="addresses to listen on, separated by commas")
    port: int = Field(6432, ge=0, le=65535, description="the port; 0 takes a free one")
    unix_dir: str | None = Field(None, description="directory of a Unix socket, beside the addresses")
    tls_cert: Path | None = Field(None, description="certificate (chain) for clients, PEM")
    tls_key: Path | None = Field(None, description="its key, PEM; none: it stands in tls_cert")
    tls_mode: Literal["disable", "allow", "require"] = Field(
        "allow", description="whether clients may, or must, use TLS"
    )
    login_timeout: float = Field(
        60.0, gt=0, description="how long a log-in may take", json_schema_extra={"unit": "seconds"}
    )
    max_clients: int = Field(
        10_000, ge=1, le=1_000_000, description="clients connected at once; one more is refused"
    )


class Database(PoolSection):  # type: ignore[misc]
    """A database that clients may ask for, and where it is."""

    host: str = Field("127.0.0.1", description="hosts, separated by commas, or the directory of a Unix socket")
    port: int | str = Field(5432, description="the port, or one for each host, separated by commas")
    dbname: str | None = Field(None, description="its name at the server; none: the same")
    user: str | None = Field(None, description="the role to log in as; none: the client's own")
    password: str | None = Field(None, description="its password; none: what is known of the client's user")
    sslmode: Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"] = Field(
        "prefer", description="TLS to the server, as libpq has it"
    )
    sslrootcert: str | None = Field(None, description="the certificates that are trusted")
    sslcert: str | None = Field(None, description="our certificate, where the server asks for one")
    sslkey: str | None = Field(None, description="its key")
    sslnegotiation: Literal["postgres", "direct"] = Field("postgres", description="ask for TLS, or begin with it")


class User(PoolSection):  # type: ignore[misc]
    """Who may log in."""

    password: str | None = Field(None, description="plain, md5..., or a SCRAM-SHA-256$ verifier")
    server_password: str | None = Field(None, description="to log in at the server, where password is a verifier")
    auth: Literal["scram-sha-256", "md5", "password", "trust"] | None = Field(
        None, description="other than the general one"
    )


class Config(Model):
    """Everything the daemon is told."""

    listen: Listen = Listen()
    auth: Literal["scram-sha-256", "md5", "password", "trust"] = Field(
        "scram-sha-256", description="how clients log in"
    )
    pool: PoolSection = PoolSection()
    databases: dict[str, Database] = Field(default_factory=dict, description="by the name clients ask for")
    users: dict[str, User] = Field(default_factory=dict, description="by name")
    admin_users: list[str] = Field(
        default_factory=list, description="who may log in to the virtual database `cenote`"
    )
    metrics_host: str = Field("127.0.0.1", description="where the metrics are served")
    metrics_port: int | None = Field(None, ge=0, le=65535, description="port of the metrics; none: not served")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"

    @model_validator(mode="after")
    def _together(self) -> Config:
        problems = []
        if CONSOLE in self.databases:
            problems.append(f"databases.{CONSOLE}: this name is the virtual database's; give yours another one")
        for name in self.admin_users:
            if name not in self.users:
                problems.append(f"admin_users: {name!r} is not in users")
        if self.listen.tls_key is not None and self.listen.tls_cert is None:
            problems.append("listen.tls_key: there is no listen.tls_cert")
        for database in self.databases:
            for user in self.users or ("",):
                options = pool_options(self, database, user)
                if options.min_size > options.max_size:
                    problems.append(
                        f"databases.{database}: min_size {options.min_size} is above max_size {options.max_size}"
                    )
                    break
        if problems:
            raise ValueError("\n".join(problems))
        return self


def pool_options(config: Config, database: str, user: str) -> Any:
    """The options of one pool: [pool], then the database's, then the user's."""
    values = {**_OWN_DEFAULTS}
    for field in dataclasses.fields(PoolOptions):
        values[field.name] = _DEFAULTS.get(field.name, field.default)
    sections: list[Any] = [config.pool, config.databases.get(database), config.users.get(user)]
    given: set[str] = set()
    for section in sections:
        if section is not None:
            for name in PoolSection.model_fields:
                value = getattr(section, name)
                if value is not None:
                    values[name] = value
                    given.add(name)
    if "min_size" not in given:
        values["min_size"] = min(values["min_size"], values["max_size"])
    return ProxyPoolOptions(**{f.name: values[f.name] for f in dataclasses.fields(ProxyPoolOptions)})


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
    wait_notice: float
    cleanup_timeout: float
    max_prepared: int
    query_timeout: float | None
    idle_transaction_timeout: float | None


def config_of(values: dict[str, Any], *, file: str = "") -> Config:
    """A configuration from nested tables.

    :raises ConfigError: with every problem.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError([_told(problem, file) for problem in error.errors()]) from None


def load_config(path: Path | str) -> Config:
    """A configuration from a TOML file.

    :raises ConfigError: with every problem; for a syntax error its line.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: {error}"]) from None
    return config_of(values, file=str(path))


def _told(problem: Any, file: str) -> str:
    where = ".".join(map(str, problem["loc"]))
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = [*Config.model_fields, *Listen.model_fields, *Database.model_fields, *User.model_fields]
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, 1)
        text = "unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
    elif problem["type"] != "value_error":
        text = f"{problem['input']!r}: {text}"
    return ": ".join(filter(None, (file, where, text)))
