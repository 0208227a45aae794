"""Types of the messages that a client sends, as numbers: a scan compares bytes.

Source: PostgreSQL documentation, "Message Formats".
"""

QUERY, PARSE, BIND, DESCRIBE, CLOSE, EXECUTE = 0x51, 0x50, 0x42, 0x44, 0x43, 0x45  # Q P B D C E
SYNC, FLUSH, FUNCTION, TERMINATE = 0x53, 0x48, 0x46, 0x58  # S H F X
COPY_DATA, COPY_DONE, COPY_FAIL = 0x64, 0x63, 0x66  # d c f
KINDS = b"QPBDCESHFXdcf"
STATEMENT = 0x53  # S, in Describe and Close


def table(codes: bytes, values: bytes) -> bytes:
    """One value for each byte there is, 0 where none is given: C looks it up at once."""
    found = bytearray(256)
    for code, value in zip(codes, values, strict=True):
        found[code] = value
    return bytes(found)


#: The least length that a message of each type can have; 0 for what is no type.
SHORTEST = table(KINDS, bytes((5, 8, 12, 6, 6, 9, 4, 4, 14, 4, 4, 4, 5)))
#: Those without a body.
EMPTY = table(b"SHXc", bytes((1, 1, 1, 1)))
