"""A TCP front that makes each new connection wait, as a distant or busy server would.

It runs in a process of its own, so that relaying takes no time from the callers that are measured. It delays the
opening only: once connected, bytes pass as they come. It counts what it accepted, which is how many connections a
pool has dialed, whatever the pool says. It refuses to inject faults; `cenote.testing` has a front for those.
"""

import asyncio
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized


class Front:
    """A running front: where it listens, and how many connections it has accepted."""

    def __init__(self, port: int, accepted: "Synchronized[int]") -> None:
        self.port = port
        self._accepted = accepted

    def accepted(self) -> int:
        return self._accepted.value


@contextmanager
def delayed(host: str, port: int, delay_s: float) -> Iterator[Front]:
    """A front to `host:port` whose connections open `delay_s` late."""
    # Not forked: this process has threads.
    context = multiprocessing.get_context("spawn")
    accepted = context.Value("i", 0)
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(host, port, delay_s, accepted, there), daemon=True)
    process.start()
    try:
        yield Front(here.recv(), accepted)
    finally:
        process.terminate()
        process.join()


def _serve(host: str, port: int, delay_s: float, accepted: "Synchronized[int]", parent: Connection) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with accepted.get_lock():
            accepted.value += 1
        await asyncio.sleep(delay_s)
        with suppress(OSError):
            from_server, to_server = await asyncio.open_connection(host, port)
            await asyncio.gather(_relay(reader, to_server), _relay(from_server, writer))
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=256)
        parent.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


async def _relay(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
    sink.close()
