"""The client's side of a log-in at PostgreSQL, without I/O: what the server asks for, and what is answered.

Trust, password in clear text, MD5, and SCRAM-SHA-256, bound to the server's certificate where there is TLS.

Source: PostgreSQL documentation, "Message Flow", start-up.
"""

import time

from cenote.errors import TargetUnusable
from cenote.measure.address import Address
from cenote.wire import md5, messages
from cenote.wire.binding import server_end_point
from cenote.wire.scram import MECHANISM_PLUS, ClientExchange, Keys

_OK, _CLEARTEXT, _MD5, _SASL, _SASL_CONTINUE, _SASL_FINAL = 0, 3, 5, 10, 11, 12


class LogIn:
    """One log-in.

    certificate: the server's, DER, where the connection has TLS

    method: how it was done; iterations, derivation_s: of SCRAM, and the CPU seconds that its keys took
    last_word: what was answered last is all that the server needs
    proven: the server has let us in, and has proven itself where its method does that

    :raises TargetUnusable: from `answer`: there is no answer
    :raises ProtocolError: the server does not keep to the protocol, or does not know our password's verifier
    """

    def __init__(self, address: Address, certificate: bytes | None) -> None:
        self._address = address
        self._binding = server_end_point(certificate) if certificate is not None else None
        self._exchange: ClientExchange | None = None
        self.method = "trust"
        self.iterations = 0
        self.derivation_s = 0.0
        self.last_word = False
        self.proven = False

    @staticmethod
    def demands(body: bytes) -> bool:
        """Whether this authentication message wants an answer."""
        return int.from_bytes(body[:4], "big") not in (_OK, _SASL_FINAL)

    def answer(self, body: bytes) -> bytes:
        code, data = int.from_bytes(body[:4], "big"), body[4:]
        if code == _SASL:
            return self._begin_scram(data)
        if code == _SASL_CONTINUE and self._exchange is not None and not self.last_word:
            return self._prove(self._exchange, data)
        if self._address.binding_required:
            raise self._unusable("channel_binding=require, and the server does not ask for SCRAM")
        self.last_word = True
        if code == _CLEARTEXT:
            self.method = "password"
            return messages.cstring(self._password())
        if code == _MD5 and len(data) == 4:
            self.method = "md5"
            return messages.cstring(md5.response(md5.stored(self._address.user, self._password()), data))
        raise self._unusable(f"the server asks for authentication of kind {code}, which is not spoken here")

    def take(self, body: bytes) -> None:
        """SASLFinal, or the end."""
        if int.from_bytes(body[:4], "big") == _SASL_FINAL and self._exchange is not None:
            self._exchange.verify(body[4:])
            self._exchange = None
        elif int.from_bytes(body[:4], "big") == _OK:
            self.proven = self._exchange is None

    def _begin_scram(self, data: bytes) -> bytes:
        offered = [name.decode("ascii", "replace") for name in messages.cstrings(data) if name]
        self._exchange = ClientExchange(offered, binding=self._binding)
        if self._address.binding_required and self._exchange.mechanism != MECHANISM_PLUS:
            raise self._unusable("channel_binding=require, and the server offers SCRAM without it")
        self.method = self._exchange.mechanism.lower()
        first = self._exchange.first()
        return messages.cstring(self._exchange.mechanism) + len(first).to_bytes(4, "big") + first

    def _prove(self, exchange: ClientExchange, data: bytes) -> bytes:
        exchange.challenge(data)
        begun = time.thread_time()
        keys = Keys.of_password(self._password(), exchange.salt, exchange.iterations)
        self.derivation_s = time.thread_time() - begun
        self.iterations = exchange.iterations
        self.last_word = True
        return exchange.final(keys)

    def _password(self) -> str:
        if self._address.password is None:
            raise self._unusable("the server asks for a password, and none is known")
        return self._address.password

    @staticmethod
    def _unusable(why: str) -> TargetUnusable:
        return TargetUnusable(f"cannot measure this server: authentication: {why}")
