"""A client's log-in: what it may ask for first, who it is, what it wants.

It ends before AuthenticationOk, which whoever called writes with all that follows it: by then it may turn out
that there is no server to answer from. Failures are told to the client in PostgreSQL's words and SQLSTATEs, and
the connection is closed. Memory is bounded by the inbox and the size of each message; the caller bounds the time.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cenote.errors import ProtocolError
from cenote.proxy.auth import say
from cenote.proxy.auth.admit import Known, Secret, admit, no_rule
from cenote.proxy.auth.keys import KeyCache
from cenote.proxy.auth.maps import NO_MAPS, Maps
from cenote.proxy.auth.prove import is_verifier
from cenote.proxy.auth.rules import Arrival, Rule, Rules, read_address
from cenote.wire.certificate import common_name
from cenote.wire.refusal import Refusal
from cenote.wire.startup import Cancel, Hello, StartTLS, Startup, packet_length

if TYPE_CHECKING:
    from cenote.proxy.config import Config

__all__ = ["CONSOLE", "Cancel", "Gate", "Login", "Refused", "login"]

#: The virtual database that answers SHOW.
CONSOLE = "cenote"

_LABEL_CHARS = 63

# What a refusal is counted as.
_REASONS = {
    "08P01": "protocol",
    "0A000": "unsupported",
    "22023": "bad_parameter",
    "28000": "not_allowed",
    "28P01": "wrong_password",
    "3D000": "no_database",
    "42501": "no_admin",
    "53300": "login_line",
    "42601": "bad_parameter",
}


@dataclass(frozen=True, slots=True)
class Gate:
    """What a log-in needs of the daemon.

    tls: the context for clients; None: no TLS
    rules: who may log in and how; None: the option `auth`, and that of each user. maps: those that rules name
    secrets: what is known of users (`find`, `proven`); None: what the configuration has
    admission: whose `turn` lets one log-in after the other go on; None: all at once
    """

    config: Config
    tls: ssl.SSLContext | None
    keys: KeyCache
    rules: Rules | None = None
    maps: Maps = NO_MAPS
    secrets: Any = None
    admission: Any = None


@dataclass(frozen=True, slots=True)
class Login:
    """A client that has proven who it is; it waits for AuthenticationOk.

    parameters: the settings of its startup packet and its `options`, names in lower case, the last one wins
    version: of the protocol, at most 3.2
    replication: None, b"true" or b"database"
    tls: the version of TLS; None: not encrypted
    label: the common name of its certificate, else what it calls us in its TLS handshake (which proves nothing)
    method: how it has proven who it is, in the words of the rules
    """

    user: str
    database: str
    parameters: dict[bytes, bytes]
    application_name: str
    version: int
    replication: bytes | None
    tls: str | None
    label: str = ""
    method: str = ""


@dataclass(frozen=True, slots=True)
class Refused:
    """A client that was sent away and told why, where it deserves a word. As a text: what it is counted as."""

    reason: str
    sqlstate: str
    text: str
    user: str = ""
    database: str = ""

    def __str__(self) -> str:
        return self.reason


async def login(peer: Any, gate: Gate) -> Login | Cancel | Refused | None:
    """Converse until it is known what the client wants and that it may have it.

    After a `Login` the caller writes AuthenticationOk, ParameterStatus, BackendKeyData and ReadyForQuery, or a
    FATAL error. A `Cancel` gets no answer: the caller acts on it and closes. After `Refused` and None the peer is
    closed; None is a client that went away, such as a load balancer's probe, and nothing to speak of.
    """
    entry = _Entry(peer, gate)
    try:
        return await entry.run()
    except Refusal as refusal:
        if refusal.reply and not peer.lost:
            peer.write(refusal.reply)
        return entry.refused(_REASONS.get(refusal.sqlstate, "protocol"), refusal.sqlstate, refusal.text)
    except ProtocolError as error:
        text = str(error.args[0]).removesuffix(f" [{error.code}]")
        if not peer.lost:
            peer.write(Refusal("08P01", text).reply)
        return entry.refused("protocol", "08P01", text)
    except ssl.SSLError as error:
        return entry.refused("tls", "08P01", f"TLS: {(error.reason or str(error)).lower().replace('_', ' ')}")
    except ConnectionError:
        peer.close()
        return None


def _host(peer: Any) -> str:
    """The host of `address`, which a load balancer's header may have set; "": there is none."""
    address: str = getattr(peer, "address", "") or ""
    return "" if address == "unix" else address.rpartition(":")[0]


class _Entry:
    """One log-in."""

    def __init__(self, peer: Any, gate: Gate) -> None:
        self.peer = peer
        self.gate = gate
        self.user = ""
        self.database = ""
        sock = peer.transport.get_extra_info("socket")
        # Behind a load balancer it is a host's connection: the socket's other end is not the client.
        self.unix = sock is not None and sock.family == socket.AF_UNIX and _host(peer) == ""

    def refused(self, reason: str, sqlstate: str, text: str) -> Refused:
        self.peer.close()
        return Refused(reason, sqlstate, text, self.user, self.database)

    async def run(self) -> Login | Cancel:
        asked = await self._hello()
        if isinstance(asked, Cancel):
            return asked
        if asked.negotiate:
            say(self.peer, asked.negotiate)
        # Names in other encodings become legible and stay different from each other.
        self.user = asked.user.decode("utf-8", "backslashreplace")
        self.database = asked.database.decode("utf-8", "backslashreplace")
        if self.gate.admission is not None:
            await self.gate.admission.turn()
        method = await self._prove(physical=asked.replication == "true")
        self._admit()
        parameters = {name.lower(): value for name, value in asked.settings()}
        return Login(
            user=self.user,
            database=self.database,
            parameters=parameters,
            application_name=parameters.get(b"application_name", b"").decode("utf-8", "replace"),
            version=asked.version,
            replication=asked.replication.encode() if asked.replication else None,
            tls=self.peer.tls.version if self.peer.tls is not None else None,
            label=self._label(),
            method=method,
        )

    async def _hello(self) -> Cancel | Startup:
        """Up to the packet that says what the connection is for."""
        inbox = self.peer.inbox
        required = self.gate.config.listen.tls_mode == "require"
        hello = Hello(tls=self.gate.tls is not None, unix=self.unix, tls_required=required)
        step: Any = hello.first_byte((await inbox.peek(1))[0])
        while True:
            if isinstance(step, StartTLS):
                await self._start_tls(hello, step.reply)
            elif isinstance(step, (Cancel, Startup)):
                return step
            elif step is not None:
                say(self.peer, step.reply)
            body = await inbox.exactly(packet_length(await inbox.exactly(4)))
            step = hello.packet(body, inbox.buffered())

    async def _start_tls(self, hello: Hello, reply: bytes) -> None:
        """After `reply`, or, with none, from the bytes that have come already."""
        early = b""
        if reply:
            say(self.peer, reply)
        else:
            early = self.peer.inbox.take()
        await self.peer.start_tls(self.gate.tls, server_side=True, early=early)
        hello.secured(self.peer.tls.alpn)

    async def _prove(self, *, physical: bool) -> str:
        """Return by which method the client has proven who it is."""
        gate, tls = self.gate, self.peer.tls is not None
        address = None if self.unix else read_address(_host(self.peer) or self._peer_name())
        arrival = Arrival(self.user, self.database, self.unix, address, tls, physical)
        rule = self._usual() if gate.rules is None else gate.rules.match(arrival)
        if rule is None:
            raise no_rule(arrival)
        by_scram = rule.method == "md5" and self._strangers_by_scram()
        try:
            proof = await admit(
                self.peer, arrival, rule, gate.maps, self._find, gate.keys, strangers_by_scram=by_scram
            )
        except Refusal as refusal:
            if gate.secrets is not None and refusal.sqlstate == "28P01":
                gate.secrets.doubt(self.database, self.user)
            raise
        if proof is not None and gate.secrets is not None:
            gate.secrets.proven(self.database, self.user, proof.verifier, proof.client_key)
        return rule.method

    def _usual(self) -> Rule:
        """Without rules the configuration says how."""
        known = self.gate.config.users.get(self.user)
        return Rule((known.auth if known is not None else None) or self.gate.config.auth)

    async def _find(self) -> Secret | None:
        """What is known of the user."""
        if self.gate.secrets is not None:
            found: Secret | None = await self.gate.secrets.find(self.database, self.user)
            return found
        known = self.gate.config.users.get(self.user)
        return None if known is None else Known(known.password)

    def _strangers_by_scram(self) -> bool:
        """With md5, whether those who are known log in by SCRAM: all that is known are verifiers."""
        if self.gate.secrets is not None:
            return bool(self.gate.secrets.strangers_by_scram())
        stored = [user.password for user in self.gate.config.users.values() if user.password]
        return bool(stored) and all(map(is_verifier, stored))

    def _peer_name(self) -> str:
        name = self.peer.transport.get_extra_info("peername")
        return str(name[0]) if isinstance(name, tuple) and name else ""

    def _label(self) -> str:
        tls = self.peer.tls
        if tls is None:
            return ""
        name = common_name(tls.peer_certificate or b"") or tls.server_name
        return "".join(char if char.isprintable() else "?" for char in name[:_LABEL_CHARS])

    def _admit(self) -> None:
        """Who has proven who it is hears what there is, and only then."""
        config = self.gate.config
        if self.database == CONSOLE:
            if self.user not in config.admin_users:
                raise Refusal(
                    "42501",
                    f'permission denied for database "{CONSOLE}"',
                    detail="cenote: only the users in admin_users may log in to it.",
                )
        elif self.database not in config.databases:
            raise Refusal("3D000", f'database "{self.database}" does not exist')
