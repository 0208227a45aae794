"""Replication connections: each has a server connection of its own, and bytes pass as they are, both ways.

Nothing is pooled, counted as idle or understood here; the log-in is done on either side, by the ordinary means,
and from the first ReadyForQuery on the two ends are one pipe. A side that takes no more makes the other wait.

Source: PostgreSQL documentation, "Streaming Replication Protocol".
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from cenote.proxy.auth.keys import KeyCache
from cenote.proxy.auth.secrets import Secrets
from cenote.proxy.dial import DialError, dial, send_cancel
from cenote.proxy.login import Login
from cenote.proxy.peer import Peer
from cenote.proxy.target import Target
from cenote.wire import messages

# When one end is gone, the other has this long to take what is still on its way.
_FAREWELL_S = 10.0


class Tunnels:
    """The replication connections of one daemon. `limit`: more are refused; servers allow max_wal_senders."""

    def __init__(self, keys: KeyCache, limit: int = 10) -> None:
        self.limit = limit
        self._keys = keys
        self._running: dict[Any, End | None] = {}

    def __len__(self) -> int:
        return len(self._running)

    async def run(
        self,
        client: Any,
        login: Login,
        target: Target,
        *,
        timeout: float,
        key: bytes = b"",
        secrets: Secrets | None = None,
    ) -> bool:
        """Serve this client until either end is gone; both are closed then, and the client has heard of its end.

        Everything from AuthenticationOk on is sent here. Cancelling it ends both ends at once.

        :param client: logged in, its inbox still attached
        :param timeout: seconds to open the server connection
        :param secrets: what is known of the target's role beside its password
        :param key: the BackendKeyData message that `cancel` belongs to; b"": this client cannot cancel
        :return: False: it was refused, and told why
        """
        if len(self._running) >= self.limit:
            text = f"cenote: all {self.limit} replication connections are in use"
            return _refuse(client, messages.error("FATAL", "53300", text))
        self._running[client] = None
        try:
            parameters = {**login.parameters, b"replication": login.replication or b"true"}
            if secrets is not None:
                server = await secrets.dial(target, End, parameters, timeout)
            else:
                server = await dial(
                    End,
                    target.database,
                    target.user,
                    target.password,
                    parameters,
                    timeout,
                    self._keys,
                    dbname=target.dbname,
                )
            self._running[client] = server
            await _join(client, server, key)
        except DialError as error:
            return _refuse(client, _told(error))
        except BaseException:
            client.abort()
            raise
        finally:
            del self._running[client]
        return True

    async def cancel(self, client: Any) -> bool:
        """Cancel what this client's server connection runs; whether that was delivered."""
        server = self._running.get(client)
        if server is None:
            return False
        return bool(await send_cancel(server.endpoint, server.backend_pid, server.backend_secret))


class End(Peer, asyncio.Protocol):
    """One end of a tunnel: what comes in goes out at the other."""

    def __init__(self) -> None:
        super().__init__()
        self.other: End | None = None
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Filled in by the log-in.
        self.parameters: dict[bytes, bytes] = {}
        self.backend_pid = 0
        self.backend_secret = b""
        self.endpoint: Any = None
        self.version = 0
        self._early = b""  # what came before there was another end

    def join(self, other: End) -> None:
        """From now on `other` hears what this end hears."""
        self.other = other
        if self.stalled:
            other.mute()
        early, self._early = self._early, b""
        if early:
            self.received(early)

    def received(self, data: bytes) -> None:
        if self.other is None:
            self._early += data
        elif not self.other.over.done():
            self.other.write(data)

    def full(self) -> None:
        if self.other is not None:
            self.other.mute()

    def drained(self) -> None:
        if self.other is not None:
            self.other.unmute()

    def gone(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)


async def _join(client: Any, server: End, key: bytes) -> None:
    """Make one pipe of both, until one end is gone."""
    welcome = b"".join(messages.parameter_status(*item) for item in server.parameters.items())
    end = _taken_over(client)
    try:
        if not end.lost:
            end.write(messages.AUTHENTICATION_OK + welcome + key + messages.READY_IDLE)
        end.join(server)
        server.join(end)
        await asyncio.wait((end.over, server.over), return_when=asyncio.FIRST_COMPLETED)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                for one in (end, server):
                    one.close()
                await asyncio.wait((end.over, server.over))
    finally:
        for one in (end, server):
            one.abort()
        if not client.lost:
            client.connection_lost(None)


def _taken_over(client: Any) -> End:
    """An end on the client's transport, in place of the client's session, with what it has not read."""
    end = End()
    rest = client.inbox.take()
    client.inbox = None
    client.unmute()
    end.connection_made(client.transport)
    end.tls = client.tls
    end.stalled = client.stalled
    end._early = rest
    if client.lost:
        end.connection_lost(None)
    else:
        client.transport.set_protocol(end)
    return end


def _refuse(client: Any, error: bytes) -> bool:
    if not client.lost:
        client.write(error)
    client.close()
    return False


def _told(error: DialError) -> bytes:
    """What a client hears of a dial that failed: the server's own words, or ours."""
    fields = error.fields
    text = fields.get("M") or f"cenote: no replication connection: {error.message}"
    return messages.error("FATAL", error.sqlstate, text, detail=fields.get("D", ""), hint=fields.get("H", ""))
