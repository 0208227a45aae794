"""Which functions touch the state of the session that calls them: a table of decisions with reasons.

Made by going through every volatile function of PostgreSQL 16 and 18 (`provolatile = 'v'`), and the stable
ones that run a text they are given. Everything in `builtins.NAMES` that is not here was judged harmless to
the session; the judgements that need a reason:

- `pg_advisory_xact_lock` and its kin, `lo_open` and other descriptors of large objects,
  `pg_export_snapshot`: end with the transaction.
- `pg_notify`, `pg_reload_conf`, `pg_stat_reset*`, `pg_wal_replay_pause`, `pg_promote`, slots and origins
  that are dropped or advanced, `lo_import`, statistics: act on the server or its files, not on the session.
- `currval`, `lastval`: read what `nextval` left (`READS`), write nothing.
- `pg_stat_clear_snapshot`, `pg_stat_force_next_flush`: only statistics, gone with the transaction.
- `table_to_xml`, `schema_to_xml`, `cursor_to_xml`: read relations, as a SELECT from a view does.
- `binary_upgrade_*`: refused outside of pg_upgrade.
- `random`, `random_normal`: move the generator, but without a seed nobody can tell.

It refuses to look inside functions: what others do is found by audit, not here.
"""

from cenote.sql.touch import ADVISORY, LOAD, ROLE, SEQUENCE, SETTINGS, UNKNOWN

#: Decided by its arguments, in `calls.py`.
SET_CONFIG = "set_config"

#: Built-in functions by what they touch.
TOUCHES = {
    "nextval": SEQUENCE,
    "setval": SEQUENCE,
    "pg_advisory_lock": ADVISORY,
    "pg_advisory_lock_shared": ADVISORY,
    "pg_try_advisory_lock": ADVISORY,
    "pg_try_advisory_lock_shared": ADVISORY,
    "pg_advisory_unlock": ADVISORY,
    "pg_advisory_unlock_shared": ADVISORY,
    "pg_advisory_unlock_all": ADVISORY,
    # The seed of random() stays to the end of the process.
    "setseed": LOAD,
    # An online backup belongs to the session that started it.
    "pg_backup_start": LOAD,
    "pg_backup_stop": LOAD,
    # A slot may be temporary (an argument): it then lives and dies with the session.
    "pg_create_logical_replication_slot": LOAD,
    "pg_create_physical_replication_slot": LOAD,
    "pg_copy_logical_replication_slot": LOAD,
    "pg_copy_physical_replication_slot": LOAD,
    "pg_sync_replication_slots": LOAD,
    # The origin stays with the session, and not even DISCARD ALL takes it away.
    "pg_replication_origin_session_setup": LOAD,
    "pg_replication_origin_session_reset": LOAD,
    "pg_replication_origin_xact_setup": LOAD,
    "pg_replication_origin_xact_reset": LOAD,
    # They run the SQL they are given as a string.
    "query_to_xml": UNKNOWN,
    "query_to_xmlschema": UNKNOWN,
    "query_to_xml_and_xmlschema": UNKNOWN,
    "ts_stat": UNKNOWN,
    "ts_rewrite": UNKNOWN,
}

#: Functions of well-known extensions, matched in any schema.
EXTENSION_TOUCHES = {
    "dblink_connect": LOAD,
    "dblink_connect_u": LOAD,
    "dblink_disconnect": LOAD,
    "set_limit": SETTINGS,  # pg_trgm: sets pg_trgm.similarity_threshold for the session
    "set_user": ROLE,
    "set_user_u": ROLE,
    "reset_user": ROLE,
    "set_session_auth": ROLE,
}

#: Settings that such a function sets.
EXTENSION_SETTINGS = {"set_limit": "pg_trgm.similarity_threshold"}

#: Built-in functions whose answer comes from state that an earlier statement left in the session.
READS = {"currval": SEQUENCE, "lastval": SEQUENCE}

#: Words that stand before a parenthesis without being a call: keywords that cannot name a function ...
_GRAMMAR = """
all and any array as between bigint bit boolean both case cast char character check coalesce collate column
constraint create cross dec decimal default distinct else end except exists extract false fetch float for
foreign freeze from full grant greatest group grouping having ilike in inner inout int integer intersect
interval into is isnull join json json_array json_arrayagg json_exists json_object json_objectagg json_query
json_scalar json_serialize json_table json_value lateral least like limit merge_action national natural
nchar none normalize not notnull null nullif numeric offset on only or order out outer overlaps overlay
placing position precision primary real references returning row select setof similar smallint some
substring symmetric table tablesample then time timestamp to treat trim true union unique user using values
varchar variadic verbose when where window with xmlattributes xmlconcat xmlelement xmlexists xmlforest
xmlnamespaces xmlparse xmlpi xmlroot xmlserialize xmltable asymmetric collation analyze analyse binary
concurrently
"""
# ... and those that could, but after which the grammar nearly always means something else.
_CLAUSES = """
by columns conflict cube exclude filter hash identity include inherits insert key list materialized operator
options over parallel partition passing range rollup set sets subscript ties vacuum within update explain
reindex cluster zone second escape return do instead
"""
NOT_CALLS = frozenset((_GRAMMAR + _CLAUSES).split())
