"""What is known of users, and what logs in as them at servers.

A user's secret comes from [users] of the configuration, else from users_file, else from the server, by auth_query.
What a server said is kept for seconds only, with the moment from which the secret is no good (VALID UNTIL); a
proof that fails drops it, so that a changed password fails at most once.

To log in at a server a password does, or an md5 hash where the server asks for that. Where only SCRAM verifiers
are known, the key that a client's own proof has shown does, at a server that has the same verifier: no password is
stored anywhere. What a server refuses (class 28) is dropped, asked for afresh, and tried once more if something
else is known then.

Unknown users, and users about whom the query fails, are None. That nobody can be looked up now is a refusal, which
is the same for everybody and names nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from cenote.proxy.auth.admit import EXPIRED, Known
from cenote.proxy.auth.answer import Dialed, DialError
from cenote.proxy.auth.keys import ClientKeys, KeyCache
from cenote.proxy.auth.lookup import Found, Lookup, LookupFailed, Lookups, Unreachable
from cenote.proxy.auth.prove import is_verifier
from cenote.proxy.auth.users_file import load_users
from cenote.proxy.dial import dial
from cenote.proxy.log import get_log
from cenote.proxy.target import Target, target_of
from cenote.reasons import Failure
from cenote.wire.refusal import Refusal
from cenote.wire.scram import Verifier

if TYPE_CHECKING:
    from cenote.proxy.config import Config, Database

log = get_log("cenote.proxy")

#: How long an answer of auth_query is used. A storm of log-ins asks once in this time; a role that is dropped or
#: given another password is let in by the old one for so long.
KEEP_S = 2.0
_MOST = 4096  # answers kept

P = TypeVar("P", bound=Dialed)


class _Answer(NamedTuple):
    """What a server said of a user. good_until: of the secret; fresh_until: of the answer."""

    found: Found | None
    good_until: float
    fresh_until: float


class _Material(NamedTuple):
    """What there is to log in with."""

    password: str | None
    shown: ClientKeys | None


class Secrets:
    """Where secrets come from under one configuration. On the event loop.

    :param keys, lookups: what outlives this configuration: keys that proofs have shown, connections to ask on
    :raises ConfigError: all that is wrong with users_file
    """

    def __init__(self, config: Config, keys: KeyCache, lookups: Lookups) -> None:
        self._config = config
        self._keys = keys
        self._lookups = lookups
        self._file = load_users(config.users_file) if config.users_file is not None else {}
        self._answers: dict[tuple[Lookup, str, str], _Answer] = {}

    # -- clients ----------------------------------------------------------------------------------------------

    async def find(self, database: str, user: str, fresh: bool = False) -> Known | None:
        """What is known of a user who wants this database; None: nothing, so that nothing will prove it.

        :param fresh: what a server said before is not enough
        :raises Refusal: nobody can be looked up now
        """
        secret = self._stored(user)
        if secret is not None:
            return Known(secret or None)
        where = self._where(database, user)
        if where is not None:
            answer = await self._ask(where, user, fresh=fresh)
            if answer.found is not None:
                return self._known(answer)
        return Known(None) if user in self._config.users else None

    def doubt(self, database: str, user: str) -> None:
        """A proof has failed: what a server said of this user may be out of date."""
        where = self._where(database, user)
        if where is not None:
            self._answers.pop((*where, user), None)

    def proven(self, database: str, user: str, verifier: Verifier, client_key: bytes) -> None:
        """A client has proven itself: its key logs in at the database's server, if that has the same verifier."""
        if database not in self._config.databases:
            return
        target = target_of(self._config, database, user)
        secret = self._remembered(database, user)
        # Of a password known in clear text the verifier is our own: no server has it.
        if target.password is None and target.asked is not None and secret and is_verifier(secret):
            self._keys.show(_place(target.database), user, verifier, client_key)

    def strangers_by_scram(self) -> bool:
        """With md5, whether those who are known log in by SCRAM: all that is stored are verifiers, as servers
        store them."""
        if self._config.auth_user or any(each.auth_user for each in self._config.databases.values()):
            return True
        stored = [secret for user in self._config.users.values() if (secret := user.password)]
        stored += filter(None, self._file.values())
        return all(map(is_verifier, stored))

    # -- servers ----------------------------------------------------------------------------------------------

    def can_begin(self, target: Target) -> bool:
        """Whether a pool may open connections before a client comes: not for who looks others up, and not where
        only the client's own proof will log in."""
        if target.user in (self._config.auth_user, target.database.auth_user):
            return False
        if target.password is not None or target.asked is None:
            return True
        secret = self._stored(target.user)
        return not (secret and is_verifier(secret)) or self._shown(target) is not None

    async def dial(
        self,
        target: Target,
        factory: Callable[[], P],
        parameters: Mapping[bytes, bytes],
        timeout: float,
        notice: Callable[[dict[str, str]], None] | None = None,
    ) -> P:
        """`dial` with what is known of the target's role; once more where that has changed meanwhile.

        :raises DialError: with the last, or every, reason.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout

        async def once(material: _Material) -> P:
            return await dial(
                factory,
                target.database,
                target.user,
                material.password,
                parameters,
                max(until - loop.time(), 0.1),
                self._keys,
                dbname=target.dbname,
                notice=notice,
                shown=material.shown,
            )

        used = await self._material(target)
        try:
            return await once(used)
        except DialError as error:
            if error.sqlstate[:2] != "28" or target.asked is None:
                raise
            if used.shown is not None and error.fields:
                self._keys.drop(_place(target.database), target.user, used.shown)
            newer = await self._material(target, fresh=True)
            if newer in (used, (None, None)):
                raise
        return await once(newer)

    async def _material(self, target: Target, *, fresh: bool = False) -> _Material:
        if target.password is not None or target.asked is None:
            return _Material(target.password, None)
        shown = self._shown(target)
        if shown is not None and not fresh:
            return _Material(None, shown)
        try:
            known = await self.find(target.asked, target.user, fresh)
        except Refusal as refusal:
            raise DialError(refusal.sqlstate, refusal.text, Failure.TEMPORARY) from None
        secret = known.text if known is not None else None
        return _Material(None if secret is None or is_verifier(secret) else secret, self._shown(target))

    def _shown(self, target: Target) -> ClientKeys | None:
        return self._keys.shown(_place(target.database), target.user)

    # -- what is written down ---------------------------------------------------------------------------------

    def _stored(self, user: str) -> str | None:
        """The secret that the configuration or the users file has; "" where a user of the file has none."""
        known = self._config.users.get(user)
        if known is not None and known.password is not None:
            return known.password
        return self._file.get(user)

    def _remembered(self, database: str, user: str) -> str | None:
        """The secret that was found last."""
        secret = self._stored(user)
        where = self._where(database, user)
        if secret is None and where is not None:
            answer = self._answers.get((*where, user))
            secret = answer.found.secret if answer is not None and answer.found is not None else None
        return secret

    # -- what servers say -------------------------------------------------------------------------------------

    def _where(self, database: str, user: str) -> tuple[Lookup, str] | None:
        """Who is asked about users of this database, and how; None: nobody.

        A database that does not exist has users too, those of the first one that is asked about: otherwise a name
        would look different there if somebody has it here. So has the console, but for who may use it: whoever can
        make roles at a server must not become our administrator.
        """
        config = self._config
        known = config.databases.get(database)
        if known is None and user not in config.admin_users:
            for name, each in config.databases.items():
                if each.auth_user or config.auth_user:
                    database, known = name, each
                    break
        role = (known.auth_user or config.auth_user) if known is not None else None
        if known is None or role is None:
            return None
        dbname = known.auth_dbname or known.dbname or database
        lookup = self._lookups.at(known, dbname, role, self._password_of(role))
        return lookup, known.auth_query or config.auth_query

    def _password_of(self, role: str) -> str | None:
        """Of a role that looks others up."""
        who = self._config.users.get(role)
        password = who.server_password if who is not None else None
        if password is None:
            password = self._stored(role)
        return None if password is None or is_verifier(password) else password

    def _known(self, answer: _Answer) -> Known:
        found = answer.found
        assert found is not None
        expired = not asyncio.get_running_loop().time() < answer.good_until
        if not found.can_login:
            # Of a role that may not log in either, an expired password proves nothing.
            return Known(None if expired else found.secret, False, "nologin")
        return Known(found.secret, not expired, EXPIRED if expired else "")

    async def _ask(self, where: tuple[Lookup, str], user: str, *, fresh: bool) -> _Answer:
        key = (*where, user)
        loop = asyncio.get_running_loop()
        answer = self._answers.get(key)
        if answer is not None and not fresh and loop.time() < answer.fresh_until:
            return answer
        lookup, query = where
        began = loop.time()
        found = None
        try:
            found = await lookup.ask(query, user)
        except LookupFailed as error:
            # Not a refusal: it may be this name that the query does not like.
            log.warning("lookup_failed", reason="query", user=user, sqlstate=error.sqlstate, error=str(error))
        except Unreachable as error:
            log.warning("lookup_failed", reason="unreachable", sqlstate=error.sqlstate, error=str(error))
            raise Refusal(
                "57P03",
                "cenote: users cannot be looked up now",
                detail="The server that knows them does not answer, or does not let us in.",
                hint="Try again later; the pooler's log has the reason.",
            ) from None
        self._answers.pop(key, None)
        good_s = found.seconds_left if found is not None else 0.0
        answer = self._answers[key] = _Answer(found, began + good_s, began + KEEP_S)
        if len(self._answers) > _MOST:
            del self._answers[next(iter(self._answers))]
        return answer


def _place(database: Database) -> str:
    """The server of a database."""
    return f"{database.host}:{database.port}"
