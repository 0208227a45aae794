"""Keys derived from passwords, each once and never on the event loop; and keys that clients have shown to have.

SCRAM makes a password slow to try, and with it slow to use: some milliseconds, or seconds where a server asks
for many iterations. Whoever asks for keys waits for a thread; whoever asks for the same keys waits for the same
one. It keeps what it made and what it was shown, up to a bound and in memory only, and knows nothing of users but
their names.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Hashable
from concurrent.futures import Executor
from typing import Any, NamedTuple

from cenote.wire.scram import ITERATIONS, SALT_BYTES, Keys, Verifier


class ClientKeys(NamedTuple):
    """Keys from a client's proof: they log in where the verifier has this salt and so many iterations."""

    iterations: int
    salt: bytes
    keys: Keys


class KeyCache:
    """What was derived and shown so far. One per event loop.

    executor: where derivations run; None: the loop's own. size: how many results are kept, the oldest go first.
    iterations: of users who do not exist, to be those of users who do
    """

    def __init__(self, executor: Executor | None = None, size: int = 4096) -> None:
        self.iterations = ITERATIONS
        self._executor = executor
        self._size = size
        self._made: dict[Hashable, asyncio.Future[Any]] = {}
        self._shown: dict[tuple[str, str], ClientKeys] = {}
        self._mock_secret = secrets.token_bytes(32)

    async def keys(self, password: str, salt: bytes, iterations: int) -> Keys:
        """The keys that log in with this password at a server that has this salt."""
        found: Keys = await self._once(
            (password, salt, iterations), lambda: Keys.of_password(password, salt, iterations)
        )
        return found

    async def verifier(self, user: str, password: str) -> Verifier:
        """What checks that a client knows this password. Its salt is the user's own, so that equal passwords
        of two users do not show."""
        found: Verifier = await self._once(
            (user, password), lambda: Verifier.of_password(password, secrets.token_bytes(SALT_BYTES))
        )
        return found

    def mock(self, user: str) -> Verifier:
        """The verifier of a user who does not exist: always the same one, and no password fits."""
        return Verifier.mock(user.encode(), self._mock_secret, self.iterations)

    async def fits(self, verifier: Verifier, password: bytes) -> bool:
        """Whether a password given in clear text is the one. Not remembered: it is whatever a client sends."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, verifier.fits, password)

    def show(self, place: str, user: str, verifier: Verifier, client_key: bytes) -> None:
        """Keep what a client's proof has shown: it logs in as this user at a server that has the same verifier.

        place: the server it may be used at. Another one could have copied the salt, and try passwords on the proof
        """
        self._shown.pop((place, user), None)
        self._shown[place, user] = ClientKeys(
            verifier.iterations, verifier.salt, Keys(client_key, verifier.server_key)
        )
        if len(self._shown) > self._size:
            del self._shown[next(iter(self._shown))]

    def shown(self, place: str, user: str) -> ClientKeys | None:
        """What the latest proof of this user has shown."""
        return self._shown.get((place, user))

    def drop(self, place: str, user: str, used: ClientKeys | None = None) -> None:
        """The server does not take these keys. `used`: drop them only if they still are the latest."""
        if used is None or self._shown.get((place, user)) is used:
            self._shown.pop((place, user), None)

    async def _once(self, key: Hashable, derive: Callable[[], Any]) -> Any:
        future = self._made.get(key)
        if future is None:
            future = asyncio.get_running_loop().run_in_executor(self._executor, derive)
            self._made[key] = future
            future.add_done_callback(lambda done: self._drop_failed(key, done))
            if len(self._made) > self._size:
                del self._made[next(iter(self._made))]
        # Shielded: others may wait for it, and it is no loss if nobody does.
        return await asyncio.shield(future)

    def _drop_failed(self, key: Hashable, done: asyncio.Future[Any]) -> None:
        if (done.cancelled() or done.exception() is not None) and self._made.get(key) is done:
            del self._made[key]
