"""What a connection to an HTTPS origin costs: name, TCP, TLS, the first request and one on the same connection.

GET requests, one connection at a time. Redirects are not followed, proxies of the environment not used: it is this
origin that is measured.
"""

import http.client
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import SplitResult, urlsplit

from cenote._version import __version__
from cenote.errors import ConfigError, TargetUnusable
from cenote.measure.address import is_number
from cenote.measure.anatomy import TIMEOUT_S, Tls
from cenote.measure.channel import Channel, Reading, Step
from cenote.measure.cost import Setup, Tell, machine
from cenote.measure.cost_figures import Spread, Way, phases_of, spread
from cenote.measure.distance import DelayLine
from cenote.measure.target import one_line

PHASES = ("dns", "tcp", "tls", "first_request", "reused_request", "teardown")
SCHEMES = ("https://", "http://")

_REUSES = 3
_RESUMPTIONS = 10
_MOST_BYTES = 16 << 20
_TITLES = {"dns": "looking up the name", "tcp": "connecting", "tls": "TLS"}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where requests go. tls: None for http://."""

    url: str
    host: str
    port: int
    path: str
    tls: ssl.SSLContext | None

    @property
    def title(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(slots=True)
class _Sample:
    steps: dict[str, Step]
    tls: Tls | None = None
    session: Any = None
    status: int = 0
    protocol: str = ""
    kept: bool = False
    body: int = 0
    ready_s: float = 0.0


@dataclass(frozen=True, slots=True)
class OriginResult:
    """All that was seen of an origin.

    status, body_bytes: of the last answer
    resumed: a TLS handshake that takes up an earlier session, in seconds; None: it never did
    client_cpu_s: of opening and closing, without the requests
    """

    setup: Setup
    url: str
    title: str
    machine: dict[str, str | int]
    tls: Tls | None
    status: int
    protocol: str
    body_bytes: int
    near: Way
    far: tuple[Way, ...]
    resumed: Spread | None
    client_cpu_s: float

    @property
    def distances(self) -> tuple[Way, ...]:
        return self.near, *self.far


def is_origin(url: str | None) -> bool:
    """Whether this is the URL of an HTTP origin, and not of a PostgreSQL server."""
    return url is not None and url.lower().startswith(SCHEMES)


def origin_of(url: str, ca: str | None = None) -> Origin:
    """Read the URL.

    :param ca: a file with the certificates to trust, PEM; None: the system's, or those of SSL_CERT_FILE
    :raises ConfigError: the URL or the file cannot be used
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError([f"{url!r} is no URL: {error}"]) from None
    problems = []
    if not parts.hostname:
        problems.append(f"{url!r} is no URL: there is no host in it")
    if parts.username is not None:
        problems.append("the URL has a user's name in it: leave it out, nobody logs in here")
    secure = parts.scheme.lower() == "https"
    if ca is not None and not secure:
        problems.append("tls-ca: http:// has no TLS")
    context = None
    if secure:
        try:
            context = ssl.create_default_context(cafile=ca)
            context.set_alpn_protocols(["http/1.1"])
        except OSError as error:
            problems.append(f"tls-ca = {ca!r}: {error.strerror or one_line(error)}")
    if problems:
        raise ConfigError(problems)
    return Origin(url, parts.hostname or "", port or (443 if secure else 80), _path(parts), context)


def _path(parts: SplitResult) -> str:
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def run_origin(
    url: str, setup: Setup, tell: Tell = lambda stage, done, total: None, *, ca: str | None = None
) -> OriginResult:
    """Take connections to the origin of `url` apart.

    :raises ConfigError: the setup or the URL cannot be used
    :raises TargetUnusable: it is not there, or does not answer as HTTP
    """
    setup.check()
    origin = origin_of(url, ca)
    family, sockaddr = _reach(origin)
    way = family, sockaddr
    _one(origin, way)  # what is cold at first
    seen = list(_sample(origin, way, None, setup, tell))
    resumed = list(_resumed(origin, way, seen[-1].session, setup, tell)) if seen[-1].session is not None else []
    far = [_way(rtt_s, list(_sample(origin, way, rtt_s, setup, tell))) for rtt_s in setup.rtts]
    near, last = _way(None, seen), seen[-1]
    cpu = sum(phase.cpu.median for phase in near.phases if not phase.name.endswith("_request"))
    return OriginResult(
        setup=setup,
        url=origin.url,
        title=origin.title,
        machine=machine(),
        tls=last.tls,
        status=last.status,
        protocol=last.protocol,
        body_bytes=last.body,
        near=near,
        far=tuple(far),
        resumed=spread(resumed) if resumed else None,
        client_cpu_s=cpu,
    )


def _reach(origin: Origin) -> tuple[int, Any]:
    """The first of the host's addresses that answers; all samples go there."""
    failed: OSError | None = None
    try:
        found = socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _failed("dns", error.strerror or one_line(error)) from None
    for family, _, _, _, sockaddr in found:
        try:
            with Channel(family, TIMEOUT_S) as channel:
                channel.connect(sockaddr)
                return family, sockaddr
        except OSError as error:
            failed = error
    assert failed is not None
    raise _failed("tcp", f"{origin.title}: {failed.strerror or one_line(failed)}")


def _sample(
    origin: Origin, way: tuple[int, Any], rtt_s: float | None, setup: Setup, tell: Tell
) -> Iterator[_Sample]:
    stage = "near" if rtt_s is None else f"{rtt_s * 1e3:g} ms away"
    until = time.monotonic() + setup.seconds
    with ExitStack() as stack:
        far = stack.enter_context(DelayLine(*way, rtt_s)).sockaddr if rtt_s is not None else None
        for number in range(setup.samples):
            tell(stage, number, setup.samples)
            yield _one(origin, way, far=far)
            if time.monotonic() > until:
                break
        tell(stage, setup.samples, setup.samples)


def _resumed(origin: Origin, way: tuple[int, Any], session: Any, setup: Setup, tell: Tell) -> Iterator[float]:
    """The handshakes that took up the session of the connection before."""
    until = time.monotonic() + setup.seconds
    most = min(setup.samples, _RESUMPTIONS)
    for number in range(most):
        tell("TLS resumed", number, most)
        one = _one(origin, way, resume=session)
        if one.tls is not None and one.tls.resumed:
            yield one.steps["tls"].seconds
        session = one.session or session
        if time.monotonic() > until:
            break


def _one(origin: Origin, way: tuple[int, Any], *, far: Any = None, resume: Any = None) -> _Sample:
    """One connection, with a request and the same again."""
    phase = ["tcp"]
    try:
        with Channel(socket.AF_INET if far else way[0], TIMEOUT_S) as channel:
            return _dissect(origin, channel, far or way[1], far is not None, resume, phase)
    except TimeoutError:
        raise _failed(phase[0], f"no answer within {TIMEOUT_S:g} s") from None
    except ssl.SSLCertVerificationError as error:
        why = f"its certificate does not pass: {error.verify_message}; --tls-ca FILE names who is trusted"
        raise _failed("tls", why) from None
    except ConnectionError as error:
        raise _failed(phase[0], error.strerror or "the server closed the connection") from None
    except http.client.HTTPException as error:
        raise _failed(phase[0], f"this is not HTTP: {type(error).__name__} {one_line(error)}"[:300]) from None
    except OSError as error:
        raise _failed(phase[0], error.strerror or one_line(error)) from None


def _dissect(origin: Origin, channel: Channel, sockaddr: Any, far: bool, resume: Any, phase: list[str]) -> _Sample:
    sample = _Sample({})
    begun = start = channel.reading()

    def ended(name: str, now: Reading) -> Reading:
        sample.steps[name] = begun.until(now)
        return now

    if not is_number(origin.host):
        phase[0] = "dns"
        socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
        begun = ended("dns", channel.reading())
        sample.steps["dns"] = replace(sample.steps["dns"], trips=None)
    phase[0] = "tcp"
    channel.connect(sockaddr, far=far)
    begun = ended("tcp", channel.reading())
    made = None
    if origin.tls is not None:
        phase[0] = "tls"
        made = channel.start_tls(origin.tls, origin.host, resume)
        begun = ended("tls", channel.reading())
    sample.ready_s = begun.at_s - start.at_s
    phase[0] = "first request"
    _request(origin, channel, sample)
    begun = ended("first_request", channel.reading())
    again = _reuse(origin, channel, sample, phase)
    if again:
        sample.steps["reused_request"] = sorted(again, key=lambda step: step.seconds)[len(again) // 2]
    if made is not None:
        sample.session = made.session
        ticket = bool(made.session and made.session.has_ticket)
        cipher = made.cipher()
        sample.tls = Tls(made.version() or "", cipher[0] if cipher else "", bool(made.session_reused), ticket)
    begun = channel.reading()
    channel.say_goodbye()
    ended("teardown", channel.reading())
    return sample


def _reuse(origin: Origin, channel: Channel, sample: _Sample, phase: list[str]) -> list[Step]:
    """The same request on the same connection, as often as the origin keeps it open."""
    again: list[Step] = []
    phase[0] = "reused request"
    while len(again) < _REUSES and sample.kept:
        begun = channel.reading()
        _request(origin, channel, sample)
        again.append(begun.until(channel.reading()))
    return again


def _request(origin: Origin, channel: Channel, sample: _Sample) -> None:
    """Ask, and read all of the answer."""
    conn = http.client.HTTPConnection(origin.host, origin.port)
    stand_in: Any = channel
    conn.sock = stand_in
    conn.auto_open = 0
    conn.request("GET", origin.path, headers={"User-Agent": f"cenote/{__version__}", "Accept": "*/*"})
    with conn.getresponse() as answer:
        body = answer.read(_MOST_BYTES)
        if len(body) == _MOST_BYTES:
            raise _failed("request", f"the answer has {_MOST_BYTES >> 20} MiB or more: choose a smaller one")
        sample.kept = not answer.will_close
        sample.protocol = {10: "HTTP/1.0", 11: "HTTP/1.1"}.get(answer.version, "HTTP")
        sample.status, sample.body = answer.status, len(body)


def _way(rtt_s: float | None, seen: list[_Sample]) -> Way:
    return Way(
        rtt_s=rtt_s,
        phases=phases_of([one.steps for one in seen], PHASES),
        ready=spread([one.ready_s for one in seen]),
        answered=spread([one.ready_s + one.steps["first_request"].seconds for one in seen]),
    )


def _failed(phase: str, why: str) -> TargetUnusable:
    return TargetUnusable(f"cannot measure this origin: {_TITLES.get(phase, phase)}: {why}")
