"""Types of the messages that a client sends, as numbers: a scan compares bytes.

Source: PostgreSQL documentation, "Message Formats".
"""

QUERY, PARSE, BIND, DESCRIBE, CLOSE, EXECUTE = 0x51, 0x50, 0x42, 0x44, 0x43, 0x45  # Q P B D C E
SYNC, FLUSH, FUNCTION, TERMINATE = 0x53, 0x48, 0x46, 0x58  # S H F X
COPY_DATA, COPY_DONE, COPY_FAIL = 0x64, 0x63, 0x66  # d c f
KINDS = b"QPBDCESHFXdcf"
EMPTY = b"SHXc"  # these have no body


def _shortest() -> list[int]:
    """The least length a message of each type can have; more than any for what is no type."""
    found = [1 << 32] * 256
    for code, least in zip(KINDS, (5, 8, 12, 6, 6, 9, 4, 4, 14, 4, 4, 4, 5), strict=True):
        found[code] = least
    return found


SHORTEST = _shortest()
STATEMENT = 0x53  # S, in Describe and Close
