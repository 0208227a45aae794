"""A histogram of durations in fixed buckets of powers of two, cheap enough for every lease.

Bucket `i` counts durations below 2**i times the first bound (64 microseconds); the last has no bound.
A few doublings find the bucket: most durations are short. Reads nothing, knows no clock.
"""

FIRST_S = 64e-6
BUCKETS = 24  # 64 us ... 268 s, then infinity
BOUNDS_S = tuple(FIRST_S * 2**i for i in range(BUCKETS - 1))

# The same as C sees them.
_FIRST_S, _LAST = FIRST_S, BUCKETS - 1


class Histogram:
    """Counts by bucket, their number and their sum in seconds."""

    def __init__(self) -> None:
        self.buckets = [0] * BUCKETS
        self.sum_s = 0.0

    def observe(self, duration_s: float) -> None:
        """Count one duration; a negative one counts as zero. O(1)."""
        at = 0
        bound = _FIRST_S
        while duration_s >= bound and at < _LAST:
            bound += bound
            at += 1
        self.buckets[at] += 1
        if duration_s > 0:
            self.sum_s += duration_s

    def count(self) -> int:
        return sum(self.buckets)

    def quantile(self, share: float) -> float:
        """An upper bound, in seconds, for the duration that `share` (0 to 1) of all stayed below."""
        wanted = share * self.count()
        seen = 0
        for bound, number in zip(BOUNDS_S, self.buckets, strict=False):
            seen += number
            if seen >= wanted:
                return bound if seen else 0.0
        return float("inf")
