"""Keys derived from passwords: each once, never on the event loop.

SCRAM makes a password slow to try, and with it slow to use: some milliseconds, or seconds where a server asks
for many iterations. Whoever asks for keys waits for a thread; whoever asks for the same keys waits for the same
one. It keeps what it made, up to a bound, and knows nothing of users but their names.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Hashable
from concurrent.futures import Executor
from typing import Any

from cenote.wire.scram import SALT_BYTES, Keys, Verifier


class KeyCache:
    """What was derived so far. One per event loop.

    executor: where derivations run; None: the loop's own. size: how many results are kept, the oldest go first.
    """

    def __init__(self, executor: Executor | None = None, size: int = 4096) -> None:
        self._executor = executor
        self._size = size
        self._made: dict[Hashable, asyncio.Future[Any]] = {}
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
        return Verifier.mock(user.encode(), self._mock_secret)

    async def fits(self, verifier: Verifier, password: bytes) -> bool:
        """Whether a password given in clear text is the one. Not remembered: it is whatever a client sends."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, verifier.fits, password)

    def forget(self) -> None:
        """Keep nothing: passwords have changed."""
        self._made.clear()

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
