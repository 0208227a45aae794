"""What an idle client costs the proxy in memory: thousands of them log in, ask once, and then do nothing.

Each measurement has a proxy of its own, just started, so that nobody's earlier clients have made room already. The
kernel's memory for the sockets is not in it: it is the same for all.
"""

import time
from contextlib import ExitStack

from benchmarks.proxy.contestants import Proxy
from benchmarks.rounds import Sample

_WARM = 8
_QUIET_S = 1.0


def measure(proxy: Proxy, clients: int, tls: bool) -> Sample:
    """Start `proxy`, measure, and end it."""
    with ExitStack() as stack:
        stack.callback(proxy.close)
        proxy.start()
        # The first ones load code and open the server connections: no part of what a client costs.
        first = proxy.client(tls=tls)
        stack.callback(first.close)
        for _ in range(_WARM):
            _come(proxy, tls, stack)
        empty_kib, began = proxy.pss_kib(), proxy.used()
        for _ in range(clients - 1):
            _come(proxy, tls, stack)
        last = proxy.client(tls=tls)
        stack.callback(last.close)
        last.query("SELECT 1")
        arrived = proxy.used()
        time.sleep(_QUIET_S)  # for those that give memory back a little later
        full_kib = proxy.pss_kib()
        for client in (first, last):  # idle, and not gone
            client.query("SELECT 1")
    return {
        "memory": (full_kib - empty_kib) / clients,
        "empty": empty_kib / 1024,
        "CPU": (arrived.cpu_s - began.cpu_s) / clients,
    }


def _come(proxy: Proxy, tls: bool, stack: ExitStack) -> None:
    client = proxy.client(tls=tls)
    stack.callback(client.close)
    client.query("SELECT 1")
    client.idle()
