"""The kinds of session state a statement may touch, as plain int flags, and the words to print for them.

Plain ints, not an enum: the flags are or-ed for every statement and a Flag member costs a hundred times
an int. This file names the kinds; it refuses to decide which statement touches which (see `classify`)
and how to undo them (that is the pool's).
"""

SETTINGS = 1  # a setting (GUC) other than role and session authorization
ROLE = 2  # current_user or session_user
TEMP = 4  # objects in the session's temporary schema
ADVISORY = 8  # advisory locks of the session
LISTEN = 16  # channels listened to
CURSOR = 32  # cursors WITH HOLD
PREPARED = 64  # statements prepared by SQL
SEQUENCE = 128  # what currval and lastval answer, and cached sequence values
PLANS = 256  # cached plans dropped; costs time, never changes an answer
LOAD = 512  # state of the server process that nothing but closing undoes: LOAD, the random seed, dblink ...
UNKNOWN = 1024  # cannot be told from the text: any of the above

ALL = 2 * UNKNOWN - 1

#: What DISCARD ALL brings back to the state of a new session.
DISCARDED = SETTINGS | ROLE | TEMP | ADVISORY | LISTEN | CURSOR | PREPARED | SEQUENCE | PLANS

WORDS = {
    SETTINGS: "settings",
    ROLE: "role",
    TEMP: "temporary objects",
    ADVISORY: "advisory locks",
    LISTEN: "listen",
    CURSOR: "held cursors",
    PREPARED: "prepared statements",
    SEQUENCE: "sequences",
    PLANS: "plans",
    LOAD: "process state",
    UNKNOWN: "unknown",
}


def words(touches: int) -> tuple[str, ...]:
    """The words for the flags set in `touches`, in the order of the flags; empty for 0."""
    return tuple(word for flag, word in WORDS.items() if touches & flag)
