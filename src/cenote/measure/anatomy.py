"""One connection to PostgreSQL taken apart: every phase from the name to the end of the server's process.

It speaks the protocol itself, on a blocking socket, in the order in which libpq does: so each phase has its own
beginning and end, its bytes and its waits. It measures one connection and judges nothing.

A phase begins with what is said and ends with its answer. A server holds its "you are in" back until the session
is set up, so that checking the proof and setting up share one round trip: it is counted as set-up, and
`authentication` ends when the proof is ready to be sent.

Source: PostgreSQL documentation, "Message Flow", start-up.
"""

import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from cenote.errors import ProtocolError, TargetUnusable
from cenote.measure.address import Address
from cenote.measure.anatomy_login import LogIn
from cenote.measure.channel import Channel, Reading, Step
from cenote.measure.target import one_line
from cenote.wire import messages

TIMEOUT_S = 15.0
_MAX_MESSAGE = 1 << 28

#: The phases in their order; a connection has those that apply to it.
PHASES = (
    "dns",
    "connect",
    "tcp",
    "first_answer",
    "tls",
    "authentication",
    "setup",
    "parameters",
    "first_query",
    "warm_query",
    "teardown",
    "gone",
)


@dataclass(frozen=True, slots=True)
class Tls:
    """What the handshake agreed on. ticket: whether the server gave something to resume by."""

    version: str
    cipher: str
    resumed: bool
    ticket: bool


@dataclass(slots=True)
class Anatomy:
    """What was seen of one connection.

    steps: by the names of PHASES
    method: how it logged in; iterations, derivation_s: of SCRAM, and the CPU that deriving its keys took
    parameters: how many settings the server reported
    backend_pid: as the server gave it
    ready_s: from the first step until ready for a query
    local_port: this end's; 0: a Unix socket
    """

    steps: dict[str, Step] = field(default_factory=dict)
    tls: Tls | None = None
    method: str = "trust"
    iterations: int = 0
    derivation_s: float = 0.0
    parameters: int = 0
    backend_pid: int = 0
    ready_s: float = 0.0
    local_port: int = 0


class Session:
    """One connection being taken apart. `with` ends it, and cancels what it runs if it has to end early.

    far: where a `DelayLine` to the address listens; None: go there directly
    resume: a TLS session of an earlier connection to offer

    :raises TargetUnusable: from every step, with the phase and what went wrong
    """

    def __init__(self, address: Address, *, far: Any = None, resume: Any = None) -> None:
        self.anatomy = Anatomy()
        self.address = address
        self.tls_session: Any = None
        self._far = far
        self._resume = resume
        self._channel = Channel(socket.AF_INET if far else address.family, TIMEOUT_S)
        self._phase = ""
        self._begun: Reading = self._channel.reading()
        self._rest = bytearray()
        self._tls_object: ssl.SSLObject | None = None
        self._secret = b""
        self._row = b""
        self._running = False
        self._start_s = 0.0

    def __enter__(self) -> Self:
        try:
            self._guarded(self._open)
        except BaseException:
            self._channel.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._running and value is not None:
            _cancel(self.address, self.anatomy.backend_pid, self._secret)
        self._channel.__exit__(None, None, None)

    def query(self, sql: str) -> Step:
        """Run it by the simple protocol and read all of the answer."""
        step: Step = self._guarded(self._query, sql)
        return step

    def value(self, sql: str) -> str:
        """The first value of the last row of what it gives; "" for NULL and for no row."""
        self.query(sql)
        first = messages.values(self._row)[0] if self._row else None
        return (first or b"").decode("utf-8", "replace")

    def finish(self) -> None:
        """Say goodbye and wait for the server's process to end; fills in `teardown` and `gone`."""
        self._guarded(self._finish)

    # -- the phases ---------------------------------------------------------------------------------------------

    def _open(self) -> None:
        address, channel = self.address, self._channel
        self._begun = channel.reading()
        self._start_s = self._begun.at_s
        if address.lookup:
            self._phase = "dns"
            socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            self._ended("dns", trips=None)
        self._phase = "tcp"
        channel.connect(self._far or address.sockaddr, far=self._far is not None)
        self._ended("connect" if address.unix else "tcp")
        self.anatomy.local_port = channel.local_port
        if address.asks_tls:
            self._encrypt()
        self._phase = "authentication"
        self._log_in()
        self.anatomy.ready_s = self._begun.at_s - self._start_s

    def _ended(self, phase: str, *, trips: int | None = 0) -> None:
        """This phase ends now, and the next begins."""
        now = self._channel.reading()
        step = self._begun.until(now)
        if trips is None:
            step = Step(step.seconds, step.cpu_s, step.up, step.down, None)
        self.anatomy.steps[phase] = step
        self._begun = now

    def _encrypt(self) -> None:
        address, channel = self.address, self._channel
        self._phase = "tls"
        if not address.direct:
            channel.send(messages.request(messages.SSL_REQUEST))
            answer = channel.recv()
            self._ended("first_answer")
            if answer == b"N" and address.tls is None:
                return
            if answer == b"S" and address.tls is None:
                raise self._failed(
                    "the server offers TLS, and libpq got in only without it, at its second attempt: choose "
                    "sslmode=disable to measure that"
                )
            if answer[:1] == b"E":  # it ends or begins just now: an error comes before the answer
                raise self._failed(_said(answer[5:]))
            if answer != b"S":
                raise self._failed(f"asked for TLS, the server answered {answer[:80]!r}")
        assert address.tls is not None
        made = channel.start_tls(address.tls, address.host or None, self._resume)
        self._ended("tls")
        self._tls_object = made
        cipher = made.cipher()
        self.anatomy.tls = Tls(
            made.version() or "", cipher[0] if cipher else "", made.session_reused or False, False
        )

    def _log_in(self) -> None:
        """From the startup packet to the first ReadyForQuery."""
        steps = self.anatomy.steps
        self._channel.send(messages.startup(self.address.startup))
        made = self._tls_object
        certificate = made.getpeercert(binary_form=True) if made is not None else None
        log_in = LogIn(self.address, certificate)
        reported = 0
        while True:
            kind, body = self._message()
            if kind == b"R" and log_in.demands(body):
                if "first_answer" not in steps and self._tls_object is None:
                    self._ended("first_answer")
                proof = messages.password(log_in.answer(body))
                if log_in.last_word:
                    self._ended("authentication")
                    self._phase = "setup"
                self._channel.send(proof)
            elif kind == b"R":
                if "setup" not in steps:
                    self._ended("setup")
                log_in.take(body)
            elif kind in (b"S", b"K", b"Z"):
                reported += len(body) + 5
                self.anatomy.parameters += kind == b"S"
                if kind == b"K":
                    self.anatomy.backend_pid = int.from_bytes(body[:4], "big", signed=True)
                    self._secret = body[4:]
                elif kind == b"Z":
                    self._ended("parameters")
                    break
            elif kind == b"E":
                raise self._failed(_said(body))
            elif kind not in (b"N", b"v"):
                raise ProtocolError(f"a message of type {kind!r} during the log-in")
        if not log_in.proven or "setup" not in steps:
            raise ProtocolError("it let us in without the proof that its method asks of it")
        self._divide(reported)
        self.anatomy.method = log_in.method
        self.anatomy.iterations = log_in.iterations
        self.anatomy.derivation_s = log_in.derivation_s

    def _divide(self, reported: int) -> None:
        """Give the reported settings their bytes: they come in one piece with the answer that ends the set-up."""
        steps = self.anatomy.steps
        setup, parameters = steps["setup"], steps["parameters"]
        moved = min(reported - parameters.down, setup.down)
        if moved > 0:
            steps["setup"] = replace(setup, down=setup.down - moved)
            steps["parameters"] = replace(parameters, down=parameters.down + moved)

    def _query(self, sql: str) -> Step:
        self._phase = "query"
        begun = self._channel.reading()
        self._running = True
        self._row = b""
        self._channel.send(messages.query(sql))
        refused = ""
        while True:
            kind, body = self._message()
            if kind == b"Z":
                break
            if kind == b"E":
                refused = _said(body)
            elif kind == b"D":
                self._row = body
            elif kind in (b"G", b"W"):
                self._channel.send(messages.copy_fail("cenote cost sends no data"))
        self._running = False
        if refused:
            raise self._failed(refused)
        return begun.until(self._channel.reading())

    def _finish(self) -> None:
        self._phase = "teardown"
        if self._tls_object is not None and self._tls_object.session is not None:
            self.tls_session = self._tls_object.session
            assert self.anatomy.tls is not None
            self.anatomy.tls = replace(self.anatomy.tls, ticket=bool(self.tls_session.has_ticket))
        self._begun = self._channel.reading()
        self._channel.send(messages.TERMINATE)
        self._channel.say_goodbye()
        self._ended("teardown")
        self._channel.await_end()
        self._ended("gone")

    # -- messages and mishaps -----------------------------------------------------------------------------------

    def _message(self) -> tuple[bytes, bytes]:
        """The next message, type and body; it waits for what is missing."""
        while True:
            if len(self._rest) >= 5:
                length = int.from_bytes(self._rest[1:5], "big")
                if not 4 <= length <= _MAX_MESSAGE:
                    raise ProtocolError(f"a message of type {bytes(self._rest[:1])!r} with length {length}")
                if len(self._rest) > length:
                    kind, body = bytes(self._rest[:1]), bytes(self._rest[5 : length + 1])
                    del self._rest[: length + 1]
                    return kind, body
            data = self._channel.recv()
            if not data:
                raise self._failed("the server closed the connection")
            self._rest += data

    def _failed(self, why: str) -> TargetUnusable:
        return TargetUnusable(f"cannot measure this server: {_TITLES.get(self._phase, self._phase)}: {why}")

    def _guarded(self, work: Callable[..., Any], *given: Any) -> Any:
        try:
            return work(*given)
        except TimeoutError:
            raise self._failed(f"no answer within {TIMEOUT_S:g} s") from None
        except ssl.SSLCertVerificationError as error:
            raise self._failed(f"its certificate does not pass: {error.verify_message}") from None
        except ProtocolError as error:
            said = str(error.args[0]).removesuffix(f" [{error.code}]")
            raise self._failed(f"the server does not keep to the protocol: {said}") from None
        except OSError as error:
            raise self._failed(error.strerror or one_line(error)) from None


_TITLES = {"dns": "looking up the name", "tcp": "connecting", "tls": "TLS", "setup": "setting the session up"}


def _said(body: bytes) -> str:
    fields = messages.error_fields(body)
    return f"the server says: {fields.get('M', 'nothing')} ({fields.get('C', 'no SQLSTATE')})"


def _cancel(address: Address, pid: int, secret: bytes) -> None:
    """Ask the server to end what that session runs, by the way it came; best effort."""
    with suppress(OSError, ValueError), Channel(address.family, TIMEOUT_S) as channel:
        channel.connect(address.sockaddr)
        if address.tls is not None:
            if not address.direct:
                channel.send(messages.request(messages.SSL_REQUEST))
                if channel.recv() != b"S":
                    return
            channel.start_tls(address.tls, address.host or None)
        channel.send(messages.cancel_request(pid, secret))
        channel.await_end()
