"""The model of a database server: CPUs that its active connections share, a bound, the price of a connection.

Active statements share the CPUs equally (processor sharing); each runs at full speed while there are no more of
them than CPUs, and all of them slow down by the scalability law, as `measure/curve.py` fits it. A law that was
measured knows the CPUs' bound already, and nothing of more connections than it was measured with: beyond, they
get done together what those got done. A job's end is kept in work done for each since the beginning, so that one
step costs O(log n) however many share.
"""

from heapq import heappop, heappush
from typing import Any

NEVER = float("inf")


class Station:
    """The CPUs. `soonest` is when the next job ends if nothing is added before; `busy` the CPU time used."""

    def __init__(self, cores: int, contention: float, coherency: float, law_to: int = 0) -> None:
        self.soonest = NEVER
        self.busy_s = 0.0
        self.jobs: list[tuple[float, int, Any]] = []
        self._cores = cores
        self._contention = contention
        self._coherency = coherency
        self._bound = law_to or cores  # jobs that can get on at once
        self._law_to = law_to or NEVER
        self._speeds: list[float] = [1.0]
        self._done = 0.0  # work done for each job since the beginning
        self._at = 0.0
        self._speed = 1.0
        self._ticket = 0

    def add(self, now: float, work_s: float, job: Any) -> None:
        """A job that takes `work_s` alone. O(log jobs)."""
        self._advance(now)
        self._ticket += 1
        heappush(self.jobs, (self._done + work_s, self._ticket, job))
        self._plan()

    def pop(self) -> Any:
        """The job that ends at `soonest`, out of the station."""
        self._advance(self.soonest)
        end, _, job = heappop(self.jobs)
        self._done = max(self._done, end)
        self._plan()
        return job

    def clear(self, now: float) -> list[Any]:
        """All jobs, out of the station: the server was stopped."""
        self._advance(now)
        jobs = [job for _, _, job in self.jobs]
        self.jobs = []
        self._plan()
        return jobs

    def speed(self, jobs: int) -> float:
        """How fast each of so many runs; 1 is alone."""
        while len(self._speeds) <= jobs:
            n = len(self._speeds)
            m = min(n, self._law_to)
            law = 1 + self._contention * (m - 1) + self._coherency * m * (m - 1)
            self._speeds.append(min(1.0, self._bound / n) / law)
        return self._speeds[jobs]

    def _advance(self, now: float) -> None:
        jobs = len(self.jobs)
        if jobs:
            self._done += (now - self._at) * self._speed
            self.busy_s += (now - self._at) * min(jobs, self._cores)
        self._at = now

    def _plan(self) -> None:
        jobs = len(self.jobs)
        if jobs:
            speeds = self._speeds
            self._speed = speeds[jobs] if jobs < len(speeds) else self.speed(jobs)
            self.soonest = self._at + max(0.0, self.jobs[0][0] - self._done) / self._speed
        else:
            self.soonest = NEVER
