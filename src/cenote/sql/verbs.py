"""What a statement may touch by what it is: one small function per verb, and a table of them.

Takes the first words of a statement as `scan.py` gathered them: keywords and unquoted names in lower case,
quoted names with a `"` before them, strings as `'`, numbers and parameters as `0`, other tokens as they
are. Function calls are not seen here. A function returns whether the functions called in the statement
run when it runs.
"""

from collections.abc import Callable

from cenote.sql.literals import fold
from cenote.sql.touch import (
    CURSOR,
    DISCARDED,
    LISTEN,
    LOAD,
    PLANS,
    PREPARED,
    ROLE,
    SEQUENCE,
    TEMP,
    UNKNOWN,
)
from cenote.sql.verdict import DEFAULT, Findings

#: How many tokens of a statement are kept as its head.
HEAD = 40


class Statement:
    """One statement as far as it has been read."""

    __slots__ = (
        "as_execute",
        "as_query",
        "calls",
        "drops_on_commit",
        "found",
        "head",
        "into_temp",
        "partition",
        "routine_body",
        "temp_path",
        "temp_schema",
    )

    def __init__(self) -> None:
        self.head: list[str] = []
        self.calls = Findings()  # by the functions called
        self.found = Findings()  # by the statement itself
        self.as_query = False  # AS outside parentheses: CREATE TABLE ... AS
        self.as_execute = False  # AS EXECUTE
        self.drops_on_commit = False
        self.into_temp = False  # SELECT ... INTO TEMP
        self.partition = False  # PARTITION OF: its bounds are computed at once
        self.routine_body = False  # BEGIN ATOMIC ... END
        self.temp_schema = False  # a name qualified with pg_temp
        self.temp_path = False  # pg_temp as a value in SET

    def word(self, i: int) -> str:
        return self.head[i] if i < len(self.head) else ""


_TRANSACTION = frozenset(("begin", "start", "commit", "end", "rollback", "abort", "savepoint", "release"))


def is_transaction_control(statement: Statement) -> bool:
    verb = statement.word(0)
    return verb in _TRANSACTION or (verb == "prepare" and statement.word(1) == "transaction")


def _harmless(statement: Statement) -> bool:
    return True


def _hidden(statement: Statement) -> bool:
    statement.found.hidden = True
    return True


def _unknown(statement: Statement) -> bool:
    statement.found.touches |= UNKNOWN
    statement.found.hidden = True
    return True


def _query(statement: Statement) -> bool:
    if statement.into_temp:
        statement.found.touches |= TEMP
    return True


def _listen(statement: Statement) -> bool:
    statement.found.touches |= LISTEN
    return True


def _load(statement: Statement) -> bool:
    statement.found.touches |= LOAD
    return True


def _set(statement: Statement) -> bool:
    word, found = statement.word, statement.found
    if word(1) == "constraints" and word(2) not in (".", "=", "to"):
        return True
    i = 1
    local = False
    # SESSION AUTHORIZATION and SESSION CHARACTERISTICS AS are phrases of their own.
    phrase = word(2) == "authorization" or (word(2) == "characteristics" and word(3) == "as")
    if (word(1) == "local" or (word(1) == "session" and not phrase)) and word(2) not in (".", "=", "to"):
        local = word(1) == "local"
        i = 2
    first, second = word(i), word(i + 1)
    names: list[str | None]
    if second in (".", "=", "to"):
        names = [_setting_name(statement, i)]
    elif first == "transaction":
        return True
    elif first == "session" and second == "authorization":
        names = ["session_authorization"]
    elif first == "session" and second == "characteristics":
        names = list(_characteristics(statement))
    elif first == "role":
        names = ["role"]
    elif first == "time" and second == "zone":
        names = ["timezone"]
    elif first == "names":
        names = ["client_encoding"]
    elif first == "schema":
        names = ["search_path"]
    elif first == "xml" and second == "option":
        names = ["xmloption"]
    else:
        names = [_setting_name(statement, i)]
    if statement.temp_path and ("search_path" in names or None in names):
        # What is created while pg_temp comes first outlives even a SET LOCAL.
        found.touches |= TEMP
    default = statement.head[-1] == "default" or (first == "time" and statement.head[-1] == "local")
    for name in names:
        # The seed outlives the transaction too.
        if not local or name == "seed":
            found.setting(name)
        if local or default:
            found.assign(name, DEFAULT if default else "", local)
    return True


def _setting_name(statement: Statement, i: int) -> str | None:
    """The name that starts at word `i`, up to TO, = or FROM; None if it is longer than the head."""
    parts: list[str] = []
    while i < len(statement.head):
        word = statement.head[i]
        if word in ("=", "to", "from"):
            return fold("".join(parts))
        parts.append(word[1:] if word[0] == '"' else word)
        i += 1
    return fold("".join(parts)) if i < HEAD else None


def _characteristics(statement: Statement) -> list[str]:
    words = {
        "isolation": "default_transaction_isolation",
        "read": "default_transaction_read_only",
        "deferrable": "default_transaction_deferrable",
    }
    return [name for word, name in words.items() if word in statement.head]


def _reset(statement: Statement) -> bool:
    word, found = statement.word, statement.found
    first, second = word(1), word(2)
    if first == "all" and second != ".":
        found.every_setting()
    elif first == "session" and second == "authorization":
        found.touches |= ROLE
    elif first == "time" and second == "zone":
        found.setting("timezone")
    elif first == "transaction" and second == "isolation":
        found.setting("transaction_isolation")
    else:
        found.setting(_setting_name(statement, 1))
    return True


def _discard(statement: Statement) -> bool:
    found = statement.found
    what = statement.word(1)
    touches = {"plans": PLANS, "sequences": SEQUENCE, "temp": TEMP, "temporary": TEMP}.get(what, DISCARDED)
    found.touches |= touches
    if touches == DISCARDED:
        found.every_setting()
    return True


# What may stand between CREATE and the kind of object.
_WORDS_BEFORE_KIND = """
or replace global local temp temporary unlogged recursive constraint foreign event trusted procedural
"""
_MODIFIERS = frozenset(_WORDS_BEFORE_KIND.split())
# What is only written down now and runs later, if ever.
_DEFINITIONS = frozenset(("view", "function", "procedure", "rule", "trigger", "policy", "domain"))


def _create(statement: Statement) -> bool:
    found = statement.found
    found.hidden = True
    temporary = statement.temp_schema
    kind = ""
    for word in statement.head[1:]:
        if word not in _MODIFIERS:
            kind = word
            break
        temporary = temporary or word in ("temp", "temporary")
    # What only this session sees, and an index, is no news to others; those who make many make these.
    found.defines = found.defines or not (temporary or kind in ("index", "unique"))
    # What the end of the transaction drops is not left in the session.
    if temporary and not (kind == "table" and statement.drops_on_commit):
        found.touches |= TEMP
    if kind == "extension" or (kind == "table" and statement.as_execute):
        found.touches |= UNKNOWN
    if kind == "table":
        return statement.as_query or statement.partition
    return kind not in _DEFINITIONS


def _alter(statement: Statement) -> bool:
    statement.found.hidden = True
    statement.found.defines = True
    if statement.word(1) == "extension":
        statement.found.touches |= UNKNOWN
    return True


def _declare(statement: Statement) -> bool:
    head = statement.head
    for i in range(2, len(head) - 2):
        if head[i] == "cursor":
            if head[i + 1] == "with" and head[i + 2] == "hold":
                statement.found.touches |= CURSOR
            break
    return True


def _cursor(statement: Statement) -> bool:
    # CLOSE, FETCH and MOVE leave nothing behind that DECLARE had not announced.
    statement.found.reads |= CURSOR
    return True


def _prepare(statement: Statement) -> bool:
    if statement.word(1) == "transaction":
        return True
    statement.found.touches |= PREPARED
    return False


def _deallocate(statement: Statement) -> bool:
    statement.found.touches |= PREPARED
    statement.found.reads |= PREPARED
    return True


def _execute(statement: Statement) -> bool:
    statement.found.reads |= PREPARED
    return _unknown(statement)


def _explain(statement: Statement) -> bool:
    """EXPLAIN runs its statement only with ANALYZE; said to be false, it counts all the same."""
    head = statement.head
    i, runs, depth = 1, False, 0
    while i < len(head):
        word = head[i]
        if word in ("analyze", "analyse", '"analyze'):
            runs = True
        elif word == "(" and (i == 1 or depth > 0):
            depth += 1
        elif word == ")" and depth > 0:
            depth -= 1
            if depth == 0:
                i += 1
                break
        elif depth == 0 and word != "verbose":
            break
        i += 1
    if i >= HEAD:
        statement.found.touches |= UNKNOWN
    statement.head = head[i:]
    inner = statement.word(0)
    if inner == "execute":
        statement.found.reads |= PREPARED
    if not runs:
        return False
    return decide(statement)


_VERBS: dict[str, Callable[[Statement], bool]] = {
    **dict.fromkeys(("select", "with", "values", "table", "("), _query),
    **dict.fromkeys(("insert", "update", "delete", "merge", "copy", "truncate"), _hidden),
    **dict.fromkeys(("drop", "grant", "revoke", "comment", "security", "reassign", "import"), _hidden),
    **dict.fromkeys(("refresh", "reindex", "analyze", "analyse", "vacuum", "cluster"), _hidden),
    **dict.fromkeys(("show", "notify", "lock", "checkpoint", *_TRANSACTION), _harmless),
    **dict.fromkeys(("listen", "unlisten"), _listen),
    **dict.fromkeys(("close", "fetch", "move"), _cursor),
    **dict.fromkeys(("do", "call"), _unknown),
    "set": _set,
    "reset": _reset,
    "discard": _discard,
    "create": _create,
    "alter": _alter,
    "declare": _declare,
    "prepare": _prepare,
    "deallocate": _deallocate,
    "execute": _execute,
    "explain": _explain,
    "load": _load,
}


def decide(statement: Statement) -> bool:
    """Note in `statement.found` what the statement may touch by its kind; returns whether its calls run.

    A verb that is not in the table is one this version does not know: it cannot be told.
    """
    return _VERBS.get(statement.word(0), _unknown)(statement)
