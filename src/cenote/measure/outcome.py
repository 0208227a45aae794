"""What became of the requests of a storm: simulated or real, one way at a time. Plain records."""

from dataclasses import dataclass
from typing import Any

import numpy as np

WAYS = ("none", "local", "budget", "proxy")


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment: server connections, those waiting in pools, requests ended since the sample before."""

    at_s: float
    connections: int
    waiting: int
    answered: int
    refused: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the requests of one way. Each is answered, refused, failed or unfinished.

    latency_s: of the answered, from asking to the answer, in the order of asking
    refused, failed: how many, by reason
    opened: server connections; peak: the most at once; rejected: attempts the server refused
    cpu_s: of the server; seconds: until the last request had ended
    events: simulated ones; 0 of a real run
    """

    way: str
    requests: int
    latency_s: Any
    refused: dict[str, int]
    failed: dict[str, int]
    unfinished: int
    opened: int
    peak: int
    rejected: int
    cpu_s: float | None
    seconds: float
    samples: tuple[Sample, ...]
    events: int = 0

    @property
    def answered(self) -> int:
        return len(self.latency_s)

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.answered / self.seconds if self.seconds else 0.0

    def percentile_s(self, share: float) -> float | None:
        """The latency that `share` (0 to 1) of the answered did not exceed."""
        if not self.answered:
            return None
        return float(np.quantile(self.latency_s, share, method="inverted_cdf"))
