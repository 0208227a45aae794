"""How many clients there are, by database and by user, and whether one more may come in.

Clients of the console are not counted and never refused: whoever is to find out why nobody gets in must get in.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cenote.proxy.config import Config
    from cenote.proxy.login import Login

#: The virtual database that answers SHOW.
CONSOLE = "cenote"


class Census:
    """Who is logged in. On the event loop; every operation O(1).

    total, databases, users: clients now
    """

    def __init__(self) -> None:
        self.total = 0
        self.databases: Counter[str] = Counter()
        self.users: Counter[str] = Counter()

    def entered(self, login: Login) -> None:
        """One more."""
        self._add(login, 1)

    def left(self, login: Login) -> None:
        """One less."""
        self._add(login, -1)

    def _add(self, login: Login, number: int) -> None:
        if login.database == CONSOLE:
            return
        self.total += number
        for counted, name in ((self.databases, login.database), (self.users, login.user)):
            counted[name] += number
            if not counted[name]:
                del counted[name]

    def refusal(self, config: Config, login: Login) -> tuple[str, str] | None:
        """Why there is no room for this one: the word it is counted as, and the cap with its numbers."""
        if login.database == CONSOLE:
            return None
        if self.total >= config.listen.max_clients:
            return "max_clients", (
                f"cenote: {self.total} clients are connected, and max_clients is {config.listen.max_clients}"
            )
        for what, name, section, counted in (
            ("database", login.database, config.databases.get(login.database), self.databases),
            ("user", login.user, config.users.get(login.user), self.users),
        ):
            cap = section.max_clients if section is not None else None
            if cap is not None and counted[name] >= cap:
                now = f'cenote: {counted[name]} clients of {what} "{name}" are connected'
                return f"max_clients_{what}", f"{now}, and its max_clients is {cap}"
        return None
