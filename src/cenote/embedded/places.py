"""Where a server may live: a free port, and a directory that is short and within its reach.

It chooses and reserves nothing: a port may be gone a moment later, and whoever asked tries again.
"""

import contextlib
import os
import random
import socket
import tempfile
from pathlib import Path

from cenote.embedded.configuration import HOST
from cenote.embedded.install import Account, open_to_all
from cenote.errors import EmbeddedError

# A socket's path holds 107 bytes on Linux and 103 on macOS.
_SOCKET_PATH_BYTES = 103


def run_dir_place(account: Account) -> str:
    """Return the temporary directory, or /tmp when that one is too long or out of the server's reach.

    Raises `EmbeddedError` when /tmp will not do either.
    """
    folders = (tempfile.gettempdir(), "/tmp")
    for folder in folders:
        longest = os.fsencode(f"{folder}/cenote-12345678/.s.PGSQL.65535")
        within_reach = not account.switch or open_to_all(Path(folder))
        if len(longest) <= _SOCKET_PATH_BYTES and within_reach and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise EmbeddedError(
        f"no temporary directory: {' and '.join(sorted(set(folders)))} must be writable, short enough for a "
        f"Unix socket ({_SOCKET_PATH_BYTES} bytes) and open to {account.name!r}"
    )


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody uses now. Raises `EmbeddedError` when none is found."""
    # Below the ports that the kernel gives to outgoing connections: one of those could take the port while
    # the server restarts. From the system's randomness: tests seed the shared generator, and processes
    # that start together would all try the same numbers.
    chooser = random.SystemRandom()
    for _ in range(1000):
        port = chooser.randrange(10_000, _first_ephemeral_port())
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                return port
    raise EmbeddedError(f"no free TCP port on {HOST}")


def _first_ephemeral_port() -> int:
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        return 49_152  # IANA's first dynamic port, which macOS uses
    return first if first > 11_000 else 65_536
