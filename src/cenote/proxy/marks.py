"""How it is known whether an UNLISTEN took effect, when what it takes away is listened to elsewhere.

On the client's own connection such an UNLISTEN does nothing. So before a text that may UNLISTEN, what the client
has is listened to anew on its own connection, in the same transaction if one is open, together with a mark: a
setting that a roll-back takes back along with the rest, savepoints included. If the mark is there afterwards, the
channels that the server tells of are the whole truth; if not, nothing was taken away.

Nothing can be put into the middle of a batch. What it may have unlistened is noted by name, and marked behind it
if a transaction is open then. It decides nothing else.
"""

from __future__ import annotations

from typing import Any

from cenote.errors import ProtocolError
from cenote.proxy.settings import UNHINDERED, literal
from cenote.wire import messages

_IDLE, _FAILED = 0x49, 0x45  # I and E, as transaction statuses


class Marks:
    """The marks of one client since the server was last asked. On the event loop.

    setting, behind_setting: where they are, as constants
    mark: the one before texts; b"": there is none yet
    parsed_at: the batch, by its connection and number, at whose beginning it was set
    doubtful: what the batch under way may have unlistened, without a mark before it
    doubts: the same, with the mark that was set behind each; a name `*` is all
    """

    def __init__(self, word: bytes) -> None:
        self.tag = b"$" + word + b"$"
        self.setting = literal(b"cenote." + word + b"_m")
        self.behind_setting = literal(b"cenote." + word + b"_d")
        self.mark = b""
        self.parsed_at: tuple[Any, int] | None = None
        self.doubtful: set[bytes] = set()
        self.doubts: list[tuple[bytes, set[bytes]]] = []

    def parsed(self, server: Any) -> None:
        """What was put before a Parse is good for the rest of its batch."""
        self.parsed_at = (server, server.replies.sent)

    def before(self, server: Any, reading: Any, token: bytes, listening: bytes) -> None:
        """A text is about to run that may UNLISTEN.

        :param token: not used before
        :param listening: the SQL that listens anew
        """
        replies = server.replies
        if self.parsed_at == (server, replies.sent):
            return
        if replies.open and not replies.ends():
            self.doubtful.update(reading.unlistens)
            return
        again = self.mark != b""
        self.mark = self.mark or token
        change = b"pg_catalog.set_config(%s,%s,false);" % (self.setting, literal(self.mark)) + listening
        if again:
            # Only if a roll-back has taken the mark: what was unlistened behind it would come back.
            there = b"coalesce(pg_catalog.current_setting(%s,true),'')" % self.setting
            differs = there + b" OPERATOR(pg_catalog.<>) " + literal(self.mark)
            sql = (
                b"DO " + self.tag + b"BEGIN IF " + differs + b" THEN PERFORM " + change + b";END IF;END" + self.tag
            )
        else:
            sql = b"SELECT " + change
        if server.status == _IDLE and replies.kind == 0:
            sql = UNHINDERED + sql  # in a transaction it would be the client's, too
        server.inject(sql, None)

    def behind(self, server: Any, token: bytes) -> None:
        """A batch has ended, and a transaction is open."""
        if not self.doubtful or server.replies.kind != 0 or server.replies.open:
            return
        if server.status != _FAILED:  # it has undone what the batch did
            self.doubts.append((token, self.doubtful))
            there = b"coalesce(pg_catalog.current_setting(%s,true),'')" % self.behind_setting
            more = there + b" OPERATOR(pg_catalog.||) " + literal(b"," + token)
            server.inject(b"SELECT pg_catalog.set_config(%s,%s,false)" % (self.behind_setting, more), None)
        self.doubtful = set()

    def question(self) -> bytes:
        """The SQL that asks for the channels and the marks."""
        return (
            b"SELECT 'c', c FROM pg_catalog.pg_listening_channels() AS c"
            b" UNION ALL SELECT 'm', pg_catalog.current_setting(%s, true)"
            b" UNION ALL SELECT 'd', pg_catalog.current_setting(%s, true)" % (self.setting, self.behind_setting)
        )

    def answer(self, rows: list[bytes], before: set[bytes], ours: bytes, failed: bool) -> set[bytes]:
        """What the client listens to. There are no marks any more.

        :param before: what it listened to elsewhere
        :param ours: how channels begin that are not the client's
        :param failed: its last batch has failed
        :raises ProtocolError: these are no rows
        """
        own: set[bytes] = set()
        marked = False
        survived: list[bytes] = []
        for row in rows:
            values = messages.values(row)
            if len(values) != 2:
                raise ProtocolError("the answer to a question about channels has not two columns")
            kind, value = values
            if value is None:
                continue
            if kind == b"m":
                marked = self.mark != b"" and value == self.mark
            elif kind == b"d":
                survived = value.split(b",")
            elif not value.startswith(ours):
                own.add(value)
        gone = set().union(*(names for mark, names in self.doubts if mark in survived))
        if not failed:
            gone |= self.doubtful
        after = own if marked else before | own
        self.mark = b""
        self.doubtful, self.doubts = set(), []
        return own if b"*" in gone else after - (gone - own)

    def reset(self) -> bytes:
        """The SQL that leaves no mark."""
        return b"SELECT pg_catalog.set_config(s,'',false) FROM (VALUES (%s),(%s)) AS v (s)" % (
            self.setting,
            self.behind_setting,
        )
