"""What is wrong with a configuration, in words: of single values, and between values that are right by themselves.

Each problem names the key path, the value and what is allowed. Secrets are never shown. It changes nothing.
"""

from __future__ import annotations

import difflib
import os
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cenote.errors import ConfigError
from cenote.proxy.auth.maps import NO_MAPS, load_maps
from cenote.proxy.auth.rules import Rule, load_rules
from cenote.proxy.auth.users_file import load_users
from cenote.proxy.balancer import Balancers
from cenote.wire import md5
from cenote.wire.scram import Verifier
from cenote.wire.tls import client_context, server_context

if TYPE_CHECKING:
    from cenote.proxy.config import Config, Database, Listen, User

#: The virtual database that answers SHOW.
CONSOLE = "cenote"

_VERIFIER = "SCRAM-SHA-256$"
_MAX_SOCKET_PATH_BYTES = 107  # sun_path of Linux, without its final zero
_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "path_type": "a path",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "finite_number": "a finite number",
}


# -- of single values -----------------------------------------------------------------------------------------


def told(problem: Any, root: type[BaseModel]) -> str:
    """One error of pydantic: key path, value, what is allowed.

    :param root: the model of the whole, which knows the ranges
    """
    keys = [str(key) for key in problem["loc"]]
    where = ".".join(keys)
    kind, value = problem["type"], problem["input"]
    if kind == "value_error":
        return f"{where} = {problem['msg'].removeprefix('Value error, ')}"
    if kind == "extra_forbidden":
        section = _section(root, keys[:-1])
        return f"{where}: unknown key{near(keys[-1], section.model_fields if section else ())}"
    section = _section(root, keys[:-1])
    field = section.model_fields.get(keys[-1]) if section else None
    shown = "..." if "password" in keys[-1] else repr(value)
    if kind in _KINDS:
        bounds = _allowed(field) if field is not None else ""
        return f"{where} = {shown}: must be {_KINDS[kind]}" + (f", {bounds}" if bounds else "")
    if field is not None and (allowed := _allowed(field)):
        hint = near(str(value), _choices(field))
        return f"{where} = {shown}: allowed is {allowed}{hint}"
    return f"{where} = {shown}: {problem['msg']}"


def near(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing."""
    found = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _section(model: type[BaseModel], keys: list[str]) -> type[BaseModel] | None:
    """The model of the table at this path."""
    found: Any = model
    for key in keys:
        if isinstance(found, type) and issubclass(found, BaseModel):
            field = found.model_fields.get(key)
            found = field.annotation if field else None
        elif typing.get_origin(found) is dict:
            found = typing.get_args(found)[1]
        else:
            return None
    if isinstance(found, type) and issubclass(found, BaseModel):
        return found
    return None


def _choices(field: FieldInfo) -> tuple[str, ...]:
    for kind in (field.annotation, *typing.get_args(field.annotation)):
        if typing.get_origin(kind) is Literal:
            return typing.get_args(kind)
    return ()


def _allowed(field: FieldInfo) -> str:
    """What the declaration of an option allows, in words; "" where all of its type is."""
    choices = _choices(field)
    if choices:
        return ", ".join(map(repr, choices))
    low = high = ""
    for bound in field.metadata:
        if getattr(bound, "gt", None) is not None:
            low = f"more than {bound.gt:,.15g}"
        elif getattr(bound, "ge", None) is not None:
            low = f"{bound.ge:,.15g}"
        elif getattr(bound, "le", None) is not None:
            high = f"{bound.le:,.15g}"
    extra = field.json_schema_extra
    unit = f" {extra['unit']}" if isinstance(extra, dict) and extra.get("unit") else ""
    if low and high:
        return f"{low} to {high}{unit}"
    if low:
        return (low if low.startswith("more") else f"{low} or more") + unit
    return ""


def allowed(field: FieldInfo) -> str:
    """The range or the choices of an option, for its reference; "" where all of its type is allowed."""
    return _allowed(field).replace("'", "")


# -- between values -------------------------------------------------------------------------------------------


def problems_between(
    config: Config, options_of: Callable[[Config, str, str], Any], *, complete: bool
) -> list[str]:
    """Values that do not fit each other.

    :param options_of: the merged options of a pool, by configuration, database and user
    :param complete: see `config_of`
    """
    problems = [
        *_names(config),
        *_balancers(config.listen),
        *_sizes(config, options_of),
        *_modes(config, options_of),
    ]
    if complete:
        problems += _nothing(config)
        for name, user in config.users.items():
            problems += _log_in(config, name, user)
        problems += [*_listening(config), *_files(config), *_rules(config), *_users(config)]
    return problems


def warnings_of(config: Config) -> list[str]:
    """What is allowed and dangerous, for whoever starts the daemon."""
    if config.rules_file is not None:
        return [
            f"rules_file: {rule.file}:{rule.line}: whoever it matches is let in without a password"
            for rule in load_rules(config.rules_file).rules
            if rule.method == "trust" and rule.kind != "local" and not rule.clientcert
        ]
    trusted = [name for name, user in config.users.items() if (user.auth or config.auth) == "trust"]
    if not trusted:
        return []
    return [
        f"auth = 'trust': whoever can reach {_reach(config.listen)} is let in without a password as "
        f"{', '.join(trusted)}"
    ]


def _reach(listen: Listen) -> str:
    hosts = [host.strip() for host in listen.host.split(",") if host.strip()]
    return " or ".join([*hosts, *([listen.unix_dir] if listen.unix_dir else [])])


def _names(config: Config) -> Iterator[str]:
    if CONSOLE in config.databases:
        yield f"databases.{CONSOLE}: this name is the virtual database's; give yours another one (and `dbname`)"
    for name in config.admin_users:
        if name not in config.users and config.users_file is None:
            yield f"admin_users = {name!r}: not in users{near(name, config.users)}"
    if config.listen.tls_key is not None and config.listen.tls_cert is None:
        yield "listen.tls_key: there is no listen.tls_cert that it belongs to"
    if config.listen.tls_ca is not None and config.listen.tls_cert is None:
        yield "listen.tls_ca: without listen.tls_cert there is no TLS, and clients show no certificates"
    if config.map_file is not None and config.rules_file is None:
        yield "map_file: only rules name maps, and there is no rules_file"
    for name, database in config.databases.items():
        hosts, ports = database.host.split(","), str(database.port).split(",")
        if len(ports) not in (1, len(hosts)):
            yield f"databases.{name}.port = {database.port!r}: {len(ports)} ports for {len(hosts)} hosts"


def _balancers(listen: Listen) -> Iterator[str]:
    for word in listen.proxy_protocol_from:
        try:
            Balancers([word])
        except ValueError as error:
            yield f"listen.proxy_protocol_from = {word!r}: {error}; allowed are networks, addresses, and 'unix'"


def _sizes(config: Config, options_of: Callable[[Config, str, str], Any]) -> Iterator[str]:
    for database in config.databases:
        for user in config.users or ("",):
            options = options_of(config, database, user)
            if options.min_size > options.max_size:
                pool = f"{database}/{user}" if user else database
                yield (
                    f'pool "{pool}": min_size = {options.min_size} is above max_size = {options.max_size}: '
                    "lower min_size or raise max_size"
                )


def _modes(config: Config, options_of: Callable[[Config, str, str], Any]) -> Iterator[str]:
    for database in config.databases:
        for user in config.users or ("",):
            options = options_of(config, database, user)
            if options.observe and options.mode != "session":
                pool = f"{database}/{user}" if user else database
                yield (
                    f'pool "{pool}": observe = true with mode = {options.mode!r}: a dry run tells what '
                    "transaction mode would do while nothing is multiplexed; it needs mode = 'session'"
                )


def _nothing(config: Config) -> Iterator[str]:
    if not config.databases:
        yield "databases: there are none; add a table such as [databases.app]"
    if not config.users and config.users_file is None and not _asks(config):
        yield "users: there are none, so nobody could log in; add a table such as [users.app]"


def _log_in(config: Config, name: str, user: User) -> Iterator[str]:
    """Whether this user can come in, and whether we can then log in at the server for it."""
    by_rules = config.rules_file is not None  # they say by which method
    method = "" if by_rules else user.auth or config.auth
    where, stored = f"users.{name}.password", user.password
    if stored is None:
        elsewhere = config.users_file is not None or _asks(config)
        if method != "trust" and not by_rules and not elsewhere:
            yield f"{where}: there is none, so this user can never log in with auth = {method!r}"
        return
    if not stored and method != "trust":
        yield f"{where}: it is empty, and an empty password proves nothing"
        return
    if md5.is_stored(stored):
        if method == "scram-sha-256":
            yield (
                f'{where}: an md5... password cannot prove anything by auth = "scram-sha-256"; '
                'store a SCRAM-SHA-256$ verifier or the password itself, or give this user auth = "md5"'
            )
    elif stored.startswith(_VERIFIER):
        try:
            Verifier.parse(stored)
        except ValueError as error:
            yield f"{where}: {error}"


def _asks(config: Config) -> bool:
    """Whether servers are asked who somebody is."""
    return any(known.auth_user or config.auth_user for known in config.databases.values())


def _users(config: Config) -> Iterator[str]:
    """The users file, and what auth_query needs."""
    known = set(config.users)
    if config.users_file is not None:
        try:
            known |= load_users(config.users_file).keys()
        except ConfigError as error:
            yield from (f"users_file: {problem}" for problem in error.problems)
            return
        for name in config.admin_users:
            if name not in known:
                yield f"admin_users = {name!r}: neither in users nor in users_file{near(name, known)}"
    queries = {"auth_query": config.auth_query} | {
        f"databases.{name}.auth_query": database.auth_query
        for name, database in config.databases.items()
        if database.auth_query is not None
    }
    for key, query in queries.items():
        if "$1" not in query:
            yield f"{key}: it has no $1, which stands for the user's name"
    for name, database in config.databases.items():
        if (database.auth_query or database.auth_dbname) and not (database.auth_user or config.auth_user):
            yield f"databases.{name}: there is no auth_user to look users up as"


def _listening(config: Config) -> Iterator[str]:
    listen = config.listen
    if listen.tls_mode == "require" and listen.tls_cert is None:
        yield "listen.tls_mode = 'require': there is no listen.tls_cert to offer"
    if listen.unix_dir is not None:
        path = Path(listen.unix_dir) / f".s.PGSQL.{listen.port}"
        if not Path(listen.unix_dir).is_dir():
            yield f"listen.unix_dir = {listen.unix_dir!r}: there is no such directory"
        elif not os.access(listen.unix_dir, os.W_OK | os.X_OK):
            yield f"listen.unix_dir = {listen.unix_dir!r}: we may not write there"
        if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
            yield f"listen.unix_dir = {listen.unix_dir!r}: longer than a socket's path may be"
    elif not listen.host.strip(" ,"):
        yield "listen.host = '': with no unix_dir either, nobody could connect"
    usual = {} if config.rules_file is not None else config.users
    in_clear = [name for name, user in usual.items() if (user.auth or config.auth) == "password"]
    if in_clear and listen.unix_dir is None and (listen.tls_cert is None or listen.tls_mode == "disable"):
        yield (
            "auth = 'password': a password in clear text is taken over TLS or a Unix socket only; give "
            f"listen.tls_cert or listen.unix_dir (users: {', '.join(in_clear)})"
        )
    if config.metrics_port is not None and config.metrics_port == listen.port != 0:
        yield f"metrics_port = {config.metrics_port}: clients have this port (listen.port)"


def _files(config: Config) -> Iterator[str]:
    """Certificates and keys, by loading them as the daemon will."""
    listen = config.listen
    if listen.tls_cert is not None:
        files = listen.tls_cert, listen.tls_key or listen.tls_cert, listen.tls_ca
        yield from _refused("listen.tls_cert", lambda: server_context(*files))
    for name, database in config.databases.items():
        if database.sslmode == "disable":
            if database.sslnegotiation == "direct":
                yield f"databases.{name}.sslnegotiation = 'direct': sslmode = 'disable' does not allow it"
            continue
        if database.sslnegotiation == "direct" and database.sslmode in ("allow", "prefer"):
            yield (
                f"databases.{name}.sslnegotiation = 'direct': sslmode = {database.sslmode!r} is too weak for it; "
                "use require, verify-ca or verify-full"
            )
        yield from _refused(f"databases.{name}.sslmode = {database.sslmode!r}", _loader(database))


def _rules(config: Config) -> Iterator[str]:
    """The files that say who may log in, and what they need of each other and of the rest."""
    rules: list[Rule] = []
    maps = NO_MAPS
    try:
        if config.rules_file is not None:
            rules = list(load_rules(config.rules_file).rules)
    except ConfigError as error:
        yield from (f"rules_file: {problem}" for problem in error.problems)
    try:
        if config.map_file is not None:
            maps = load_maps(config.map_file)
    except ConfigError as error:
        yield from (f"map_file: {problem}" for problem in error.problems)
        return
    for rule in rules:
        where = f"rules_file: {rule.file}:{rule.line}"
        if rule.clientcert and config.listen.tls_ca is None:
            yield f"{where}: it asks for a client's certificate, and there is no listen.tls_ca to verify one by"
        if rule.map and rule.map not in maps.names:
            yield f"{where}: map={rule.map}: no line of map_file has this map{near(rule.map, maps.names)}"


def _loader(database: Database) -> Callable[[], Any]:
    return lambda: client_context(database.sslmode, database.sslrootcert, database.sslcert, database.sslkey)


def _refused(where: str, load: Callable[[], Any]) -> Iterator[str]:
    try:
        load()
    except ConfigError as error:
        for problem in error.problems:
            yield f"{where}: {problem}"
    except OSError as error:
        yield f"{where}: {error.strerror or error}"
