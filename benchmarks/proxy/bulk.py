"""Large answers and COPY: clients that read or send 100 MB each, at the same time.

The server makes the rows out of nothing, and takes them without parsing or storing any (COPY in binary, WHERE
false), so that the proxy has the largest share that it can have.
"""

import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from benchmarks.proxy.client import Client, Failed
from benchmarks.proxy.contestants import Proxy
from benchmarks.rounds import Sample
from cenote.embedded import Postgres
from cenote.wire import messages

MB = 100
ROW_BYTES = 1000
_SINK = "cenote_bench_sink"
_ROWS_IN_A_MB = 1000
_COPY_HEADER = messages.message(b"d", b"PGCOPY\n\xff\r\n\0" + bytes(8))
_ROWS_IN_A_MESSAGE = 8  # psql sends about 8 KiB at a time


def make_table(server: Postgres) -> None:
    """The table that COPY goes into."""
    server.psql(f"CREATE UNLOGGED TABLE {_SINK} (line bytea); GRANT ALL ON {_SINK} TO {server.user}")


@dataclass(frozen=True, slots=True)
class Transfer:
    """So many clients, each with so many MB."""

    way: Literal["select", "copy"]
    clients: int
    tls: bool = False


def measure(proxy: Proxy, transfer: Transfer, mb: int) -> Sample:
    """Log them in, let them loose together, and wait for the last."""
    act = _ACTS[transfer.way]
    clients: list[Client] = []
    try:
        for _ in range(transfer.clients):
            clients.append(proxy.client(tls=transfer.tls))
            clients[-1].query("SELECT 1")
        before, began = proxy.used(), perf_counter()
        _together([lambda client=client: act(client, mb) for client in clients])  # type: ignore[misc]
        seconds, after = perf_counter() - began, proxy.used()
    finally:
        for client in clients:
            client.close()
    hundreds = transfer.clients * mb / 100
    return {
        "throughput": transfer.clients * mb / seconds,
        "time": seconds / hundreds,
        "CPU": (after.cpu_s - before.cpu_s) / hundreds,
    }


def _select(client: Client, mb: int) -> None:
    rows = mb * _ROWS_IN_A_MB
    sent = client.query(f"SELECT repeat('x', {ROW_BYTES}) FROM generate_series(1, {rows})")
    if sent < rows * ROW_BYTES:
        raise Failed(f"an answer of {sent} bytes instead of {rows * ROW_BYTES}")


def _copy(client: Client, mb: int) -> None:
    row = struct.pack("!hi", 1, ROW_BYTES) + b"x" * ROW_BYTES
    chunk = messages.message(b"d", row * _ROWS_IN_A_MESSAGE) * (_ROWS_IN_A_MB // _ROWS_IN_A_MESSAGE)
    client.copy_in(f"COPY {_SINK} FROM STDIN (FORMAT binary) WHERE false", _COPY_HEADER, chunk, mb)


_ACTS: dict[str, Callable[[Client, int], None]] = {"select": _select, "copy": _copy}


def _together(tasks: list[Callable[[], None]]) -> None:
    """Each in a thread of its own; raises what the first of them raised."""
    problems: list[Exception] = []

    def run(task: Callable[[], None]) -> None:
        try:
            task()
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
