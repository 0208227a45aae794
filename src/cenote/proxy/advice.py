"""What drivers, ORMs and tools send that touches session state, and which of their options changes that.

A small table of facts about others, for SHOW LEDGER, SHOW PINS and `cenote report`: the first pattern that is
found in a text without its literals speaks, for the kinds of consequence it is about; else what `reasons.ADVICE`
says of the reason. Each fact is from that project's documentation or source; versions are named where they matter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cenote.reasons import ADVICE, TEXT

_PINS = ("pinned", "refused")


@dataclass(frozen=True, slots=True)
class _Known:
    """Who sends texts of this pattern, and what to do.

    about: the first words of the ledger's `what` that the advice is for
    """

    pattern: re.Pattern[str]
    who: str
    do: str
    about: tuple[str, ...] = _PINS


def _known(pattern: str, who: str, do: str, *about: str) -> _Known:
    return _Known(re.compile(pattern, re.IGNORECASE), who, do, about or _PINS)


_TABLE = (
    # -- clearing on the way back to a driver's own pool
    _known(
        r"^discard all",
        "Npgsql, Rails and server_reset_query of other poolers send it when a connection is given back",
        "Npgsql: `No Reset On Close=true` spares the round trip; it costs nothing else here",
        "cleared",
        *_PINS,
    ),
    _known(
        r"^set session authorization default\s*;\s*reset all",
        "Npgsql sends it in place of DISCARD ALL when it has prepared statements",
        "`No Reset On Close=true` spares the round trip",
        "cleared",
        "carried",
        *_PINS,
    ),
    _known(
        r"pg_advisory_unlock_all\s*\(\s*\)\s*;\s*close all",
        "asyncpg's pool sends it on each release",
        "a `reset` of one's own that does nothing (asyncpg 0.30: create_pool(reset=...)) spares the round trip",
        "cleared",
        *_PINS,
    ),
    # -- prepared statements by SQL
    _known(
        r'^deallocate (?:prepare )?"?_pg3_',
        "psycopg 3 with a libpq before 17 drops statements by SQL",
        "a libpq of 17, which recent psycopg[binary] brings, closes them by the protocol; or raise "
        "`prepared_max`, or set `prepare_threshold=None`",
        "carried",
        *_PINS,
    ),
    _known(
        r'^deallocate (?:prepare )?"?a\d+',
        "Rails drops statements beyond `statement_limit` by SQL",
        "pg 1.6 with libpq 17 and a Rails that uses close_prepared; or raise `statement_limit`, or "
        "`prepared_statements: false` in database.yml",
        "carried",
        *_PINS,
    ),
    _known(
        r'^deallocate (?:prepare )?"?pdo_stmt_',
        "PHP's PDO drops its statements by SQL",
        "`PDO::ATTR_EMULATE_PREPARES => true`, or a PHP that closes them by the protocol (libpq 17)",
        "carried",
        *_PINS,
    ),
    _known(
        r"^deallocate all",
        "Prisma with `pgbouncer=true` clears before each query",
        "leave `pgbouncer=true` out of the URL: statements of the protocol work here",
        "cleared",
        *_PINS,
    ),
    # -- advisory locks
    _known(
        r"pg_try_advisory_lock(?:_shared)?\s*\(",
        "Rails migrations, job queues (GoodJob, Que) and others hold session locks",
        "run migrations in a pool of `mode = session`, or with `advisory_locks: false` in Rails' database.yml; "
        "jobs: pg_try_advisory_xact_lock, or a pool of their own",
    ),
    _known(
        r"pg_advisory_lock\s*\(",
        "migration tools (Prisma Migrate, golang-migrate, Flyway with transactional locks off, goose) hold a "
        "session lock while they run",
        "run migrations past the proxy or in a pool of `mode = session`; Prisma: `directUrl`; Flyway: "
        "`flyway.postgresql.transactional.lock=true`",
    ),
    # -- listeners
    _known(
        r'^listen "?(?:oban|public\.oban)',
        "Oban listens for its jobs",
        "`notifier: Oban.Notifiers.PG` needs no LISTEN",
    ),
    _known(
        r"^listen ",
        "job queues and caches (Oban, River, Graphile Worker, Procrastinate, Action Cable) listen",
        "give listeners a pool of their own, or the option by which they poll (River: `PollOnly`)",
    ),
    # -- cursors
    _known(
        r'declare "?_django_curs_',
        "Django's .iterator() outside of a transaction declares its cursor WITH HOLD",
        "`DISABLE_SERVER_SIDE_CURSORS: True` in DATABASES, or iterate inside transaction.atomic()",
    ),
    _known(
        r"declare .* with hold",
        "psycopg declares it for named cursors with `withhold=True`",
        "`withhold=False` and fetch inside the transaction",
    ),
    # -- sequences
    _known(
        r"^select nextval\s*\(",
        "Hibernate (and others that take keys before they insert) ask a sequence by itself",
        "Hibernate: `GenerationType.IDENTITY` takes the key from INSERT; else DISCARD SEQUENCES ends the pin",
    ),
    # -- temporary tables
    _known(
        r"^create (?:local |global )?temp(?:orary)? table \"?ht_",
        "Hibernate fills a temporary table for bulk updates",
        "`hibernate.query.mutation_strategy.local_temporary.drop_tables=true`, or an inline strategy",
    ),
    # -- settings, which are carried
    _known(
        r"^set session characteristics as transaction",
        "JDBC sends it for setReadOnly and setTransactionIsolation, psycopg2 for set_session",
        "carried; where all clients want the same, ALTER ROLE ... SET saves the conversions",
        "carried",
    ),
    _known(
        r"^set (?:session )?(?:client_min_messages|standard_conforming_strings|intervalstyle|time ?zone)\b",
        "Rails, Sequelize and others send it when they connect",
        "carried; as startup parameters (options=-c ...) or ALTER ROLE ... SET it costs not even that",
        "carried",
    ),
    _known(
        r"^set (?:session )?(?:extra_float_digits|application_name)\b",
        "JDBC sends it when it connects",
        "carried; `assumeMinServerVersion` (9.0 or later) makes it a startup parameter",
        "carried",
    ),
)

_ELSE = {
    "asked": "transaction mode asks the server behind it, and pins only if something is left",
    "cleared": "nothing is left by it",
}


def advice(what: str, statement: str) -> str:
    """What to do about a line of the ledger: of a known sender, else of the reason; "" where that is nothing.

    :param what: as in SHOW LEDGER, "pinned: listen"
    :param statement: the text without its literals
    """
    consequence, _, reason = what.partition(": ")
    for known in _TABLE:
        if consequence in known.about and known.pattern.search(statement):
            return f"{known.who}: {known.do}"
    if consequence in _PINS:
        return ADVICE.get(reason, TEXT["pinned"].get(reason, ""))
    return _ELSE.get(consequence, "")
