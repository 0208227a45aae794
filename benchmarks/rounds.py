"""Alternating rounds and their statistics: how every figure of these benchmarks comes about.

A round measures each contestant once, briefly, and their order changes from round to round, so that a slow
moment of the machine meets all alike. Ratios are taken within a round, between neighbours in time, and only
then summed up. It refuses means (one disturbed round would move them) and asserts nothing.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Sample = Mapping[str, float]
"""What one contestant did in one round: measure to value."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The median and the quartiles of a figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure of a benchmark: what it is called and how it is written."""

    name: str
    unit: str = ""
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a result. `bound` and `verdict` are empty where nothing was promised."""

    benchmark: str
    group: str
    measure: str
    unit: str
    contestant: str
    rounds: int
    value: Spread
    reference: str
    ratio: Spread | None
    bound: float | None
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def order(names: Sequence[str], number: int) -> list[str]:
    """The contestants of round `number`: forwards, then backwards (ABC, CBA ...), each time from the next one."""
    start = (number // 2) % len(names)
    turned = [*names[start:], *names[:start]]
    return turned if number % 2 == 0 else turned[::-1]


def shares(rounds: int, parts: int) -> list[int]:
    """`rounds` in `parts` shares, none of them empty."""
    parts = min(parts, rounds)
    return [(rounds + part) // parts for part in range(parts)]


def rows(
    benchmark: str,
    group: str,
    samples: Mapping[str, Sequence[Sample]],
    measures: Sequence[Measure],
    *,
    reference: str,
    bounds: Mapping[tuple[str, str], float],
) -> list[Row]:
    """Sum up the rounds of one group.

    :param samples: by contestant, the rounds in the order they were run
    :param reference: the contestant that the others are divided by
    :param bounds: by (contestant, measure), the ratio that was promised
    """
    found = []
    for measure in measures:
        for name, each in samples.items():
            values = [sample[measure.name] * measure.scale for sample in each]
            ratio = None
            if name != reference and reference in samples:
                others = [sample[measure.name] * measure.scale for sample in samples[reference]]
                # A count may be 0, and then there is no ratio to it.
                pairs = [mine / theirs for mine, theirs in zip(values, others, strict=True) if theirs]
                ratio = Spread.of(pairs) if pairs else None
            bound = bounds.get((name, measure.name))
            found.append(
                Row(
                    benchmark,
                    group,
                    measure.name,
                    measure.unit,
                    name,
                    len(each),
                    Spread.of(values),
                    reference,
                    ratio,
                    bound,
                    _verdict(ratio, bound),
                )
            )
    return found


def _verdict(ratio: Spread | None, bound: float | None) -> str:
    if bound is None:
        return ""
    if ratio is None:
        return "nothing to compare with"
    if ratio.median > bound:
        return "missed" if ratio.low > bound else "missed (the spread crosses it)"
    return "met" if ratio.high <= bound else "met (the spread crosses it)"
