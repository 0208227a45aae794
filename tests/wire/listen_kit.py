"""What the tests of LISTEN share: what the proxy listens to, and what its clients hear."""

from __future__ import annotations

from proxy_kit import RunningProxy, until
from state_kit import pinned, tell

from cenote.testing.wire import Message, RawClient, kinds


def shared(proxy: RunningProxy) -> int:
    """How many shared connections listen now."""
    return int(proxy.call(lambda: sum(pool.listener.live for pool in proxy.pools())))


def channels(proxy: RunningProxy) -> list[str]:
    """What they listen to."""
    return sorted(
        channel.decode() for pool in proxy.call(proxy.pools) for channel in list(pool.listener.by_channel)
    )


def heard(answers: list[Message]) -> list[tuple[str, str]]:
    """Channel and payload of each notification among these."""
    return [
        tuple(part.decode() for part in message.body[4:-1].split(b"\0"))  # type: ignore[misc]
        for message in answers
        if message.kind == "A"
    ]


async def hear(client: RawClient, count: int = 1) -> list[tuple[str, str]]:
    """The next notifications, and nothing else in between."""
    answers = [await client.receive() for _ in range(count)]
    assert kinds(answers) == "A" * count, answers
    return heard(answers)


def listener_pid(proxy: RunningProxy) -> int:
    """The server process of the one shared connection."""
    (pool,) = proxy.pools()
    return int(proxy.call(lambda: pool.listener.server.backend_pid))


def delivered(proxy: RunningProxy) -> int:
    """How many notifications have come by the shared connections."""
    return int(proxy.call(lambda: sum(pool.listener.delivered for pool in proxy.pools())))


async def listening(proxy: RunningProxy, client: RawClient, *texts: str, extended: bool = False) -> None:
    """After these texts the client listens by the shared connection."""
    await tell(client, *texts, extended=extended)
    await tell(client, "SELECT 1")  # which waits until the server was asked
    await until(lambda: pinned(proxy) == 0 and shared(proxy) == 1, f"{texts} are handed over")
