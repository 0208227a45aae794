"""Whom a pool logs in as, and where: the server side of one configured database for one of its users."""

from __future__ import annotations

from dataclasses import dataclass

from cenote.proxy.config import Config, Database


@dataclass(frozen=True, slots=True)
class Target:
    """Where a pool's connections go.

    password: None where the configuration has none: what is known of the client may do, or the server asks for
        none
    asked: what clients call the database, where the role is the client's own; None: what is known of the client is
        no use there
    """

    database: Database
    dbname: str
    user: str
    password: str | None
    asked: str | None = None


def target_of(config: Config, database: str, user: str) -> Target:
    """The target for the clients of `user` on the configured database `database`.

    The database's own user and password come first, then what is configured for the client's user.
    """
    known = config.databases[database]
    password = known.password
    own = known.user is None or known.user == user
    if password is None and own:
        who = config.users.get(user)
        if who is not None:
            password = who.server_password
            if password is None and who.password is not None and not _is_verifier(who.password):
                password = who.password
    return Target(known, known.dbname or database, known.user or user, password, database if own else None)


def _is_verifier(stored: str) -> bool:
    return stored.startswith("SCRAM-SHA-256$") or (stored.startswith("md5") and len(stored) == 35)
