"""The figures of connections, over all samples: medians with their spread, phase by phase, distance by distance.

Pure: samples in, figures out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from cenote.measure.anatomy import PHASES, Anatomy
from cenote.measure.channel import Step
from cenote.measure.demo import percentile

#: The phases until a connection is ready.
OPENING = PHASES[: PHASES.index("first_query")]


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and what nine tenths did not go below and above, in the unit of the values."""

    median: float
    p10: float
    p90: float
    samples: int


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    ordered = tuple(sorted(values))
    low, high = percentile(ordered, 0.1), percentile(ordered, 0.9)
    assert low is not None
    assert high is not None
    return Spread(median(ordered), low, high, len(ordered))


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase over all samples; `up` and `down` in bytes, medians as `trips` is. See `channel.Step`."""

    name: str
    seconds: Spread
    cpu: Spread
    up: int
    down: int
    trips: int | None


@dataclass(frozen=True, slots=True)
class Way:
    """What connections cost over one distance.

    rtt_s: simulated, on top of the way there is; None: that way as it is
    ready: from nothing until ready for a query; answered: until the first query was answered
    """

    rtt_s: float | None
    phases: tuple[Phase, ...]
    ready: Spread
    answered: Spread

    def phase(self, name: str) -> Phase | None:
        return next((phase for phase in self.phases if phase.name == name), None)

    @property
    def samples(self) -> int:
        return self.ready.samples

    @property
    def opening(self) -> tuple[Phase, ...]:
        """The phases until it is ready."""
        return tuple(phase for phase in self.phases if phase.name in OPENING)

    @property
    def trips(self) -> int:
        """Round trips until ready for a query, the look-up of the name not counted."""
        return sum(phase.trips or 0 for phase in self.opening)

    @property
    def warm(self) -> Phase | None:
        """The same on a connection that has answered before; None: the other end allows none."""
        return self.phase("warm_query") or self.phase("reused_request")


@dataclass(frozen=True, slots=True)
class Distance(Way):
    """To a PostgreSQL server. held: how long a request with a connection of its own holds one of the slots."""

    held: Spread

    @property
    def warm_s(self) -> float:
        """The median of a query on a connection that is there."""
        assert self.warm is not None
        return self.warm.seconds.median


def distance(rtt_s: float | None, seen: Sequence[Anatomy]) -> Distance:
    """The figures of connections over one distance. Pure."""
    return Distance(
        rtt_s=rtt_s,
        phases=phases_of([one.steps for one in seen], PHASES),
        ready=spread([one.ready_s for one in seen]),
        answered=spread([one.ready_s + one.steps["first_query"].seconds for one in seen]),
        held=spread([_held_s(one) for one in seen]),
    )


def phases_of(seen: Sequence[Mapping[str, Step]], names: Sequence[str]) -> tuple[Phase, ...]:
    """Those of the phases, in the order of `names`, that any sample has."""
    found = ((name, [steps[name] for steps in seen if name in steps]) for name in names)
    return tuple(_phase(name, steps) for name, steps in found if steps)


def _phase(name: str, steps: Sequence[Step]) -> Phase:
    trips = [step.trips for step in steps if step.trips is not None]
    return Phase(
        name=name,
        seconds=spread([step.seconds for step in steps]),
        cpu=spread([step.cpu_s for step in steps]),
        up=round(median(step.up for step in steps)),
        down=round(median(step.down for step in steps)),
        trips=round(median(trips)) if trips else None,
    )


def _held_s(one: Anatomy) -> float:
    """From the moment the server was reached until its process had ended, with one query."""
    before = sum(one.steps[name].seconds for name in ("dns", "connect", "tcp") if name in one.steps)
    after = sum(one.steps[name].seconds for name in ("first_query", "teardown", "gone"))
    return one.ready_s - before + after
