"""What a conversation is ended with: a fatal error in PostgreSQL's words, or silence.

Parsers of this room raise it where PostgreSQL would end the connection with an error of its own. It decides
nothing; whoever drives the conversation sends `reply`, logs the rest and closes.
"""

from __future__ import annotations

from cenote.errors import ProtocolError
from cenote.wire import messages


class Refusal(ProtocolError):
    """The client is refused. `sqlstate`, `text`, `detail` and `hint` say why.

    `reply` is what it is sent before the connection closes: a FATAL error, or nothing at all (b"") where an
    answer would reach somebody who does not speak the protocol, or was injected.
    """

    def __init__(
        self, sqlstate: str, text: str, *, detail: str = "", hint: str = "", reply: bytes | None = None
    ) -> None:
        super().__init__(f"{text}. {detail}" if detail else text)
        self.sqlstate = sqlstate
        self.text = text
        self.detail = detail
        self.hint = hint
        self.reply = messages.error("FATAL", sqlstate, text, detail=detail, hint=hint) if reply is None else reply
