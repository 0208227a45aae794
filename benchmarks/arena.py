"""One run: its server, its rounds, who takes part, and what is said while it goes on.

`compete` keeps all contestants of a group open and alternates between them; `one_by_one` opens each for its
turn alone, for what disturbs the server or the machine. A contestant whose package is missing is left out with a
note; any other error ends the run.
"""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.contestants import TASKS, THREADS, Sizes, Tasks, Threads
from benchmarks.rounds import Row, Sample, order, shares
from cenote.embedded import Postgres
from cenote.errors import MissingDependency

Samples = dict[str, list[Sample]]


@dataclass
class Run:
    """What every benchmark is given.

    rounds: of all benchmarks, or None: each benchmark's own number
    quick: a look, not a measurement: few and short rounds
    skipped: (benchmark, contestant, why), with what was left out
    """

    server: Postgres
    rounds: int | None = None
    quick: bool = False
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def number(self, usual: int, quick: int) -> int:
        """How many rounds."""
        return self.rounds or (quick if self.quick else usual)

    def say(self, text: str) -> None:
        """Progress: one line that is written over on a terminal, nothing elsewhere."""
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def headline(self, text: str) -> None:
        """Progress that stays."""
        self.say("")
        print(text, file=sys.stderr, flush=True)

    def skip(self, benchmark: str, contestant: str, why: str) -> None:
        note = (benchmark, contestant, why)
        if note not in self.skipped:
            self.skipped.append(note)
            self.headline(f"  {contestant} is left out: {why}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within the block this thread and the server processes begun in it share one processor.

        Left to the scheduler a connection has its server on the client's processor, or on another that must be
        woken for each query: up to a factor of four for a short one, by luck, for a connection's life. Together
        is what it mostly is on an idle machine, and the quickest: the overhead of a pool shows most. Nothing is
        done where there is no such call.
        """
        if not hasattr(os, "sched_setaffinity"):
            yield
            return
        postmaster = self.server.pid
        mine, theirs = os.sched_getaffinity(0), os.sched_getaffinity(postmaster)
        os.sched_setaffinity(0, {max(mine)})
        os.sched_setaffinity(postmaster, {max(mine)})
        try:
            yield
        finally:
            os.sched_setaffinity(postmaster, theirs)
            os.sched_setaffinity(0, mine)

    @contextmanager
    def _optional(self, benchmark: str, contestant: str) -> Any:
        try:
            yield
        except (ImportError, MissingDependency) as error:
            self.skip(benchmark, contestant, str(error))

    def compete(
        self,
        benchmark: str,
        title: str,
        names: Iterable[str],
        sizes: Sizes,
        rounds: int,
        measure: Callable[[str, Threads], Sample],
        *,
        sittings: int = 1,
    ) -> Samples:
        """Open them all, one round to warm up, then `rounds` alternating ones.

        :param sittings: close and open all this often on the way, dividing the rounds: how well a connection's
            server process happens to be placed on the processors is a matter of luck that lasts
        """
        self.headline(f"{benchmark}: {title}")
        samples: Samples = {}
        for part in shares(rounds, sittings):
            for name, each in self._sit(benchmark, names, sizes, part, measure).items():
                samples.setdefault(name, []).extend(each)
        return samples

    def _sit(
        self,
        benchmark: str,
        names: Iterable[str],
        sizes: Sizes,
        rounds: int,
        measure: Callable[[str, Threads], Sample],
    ) -> Samples:
        opened: dict[str, Threads] = {}
        try:
            for name in names:
                with self._optional(benchmark, name):
                    opened[name] = THREADS[name](self.server.dsn, sizes)
            samples: Samples = {name: [] for name in opened}
            for number in range(-1, rounds):
                for name in order(list(opened), max(number, 0)):
                    self.say(f"  round {number + 1} of {rounds}: {name}")
                    sample = measure(name, opened[name])
                    if number >= 0:
                        samples[name].append(sample)
            self.say("")
            return samples
        finally:
            for pool in opened.values():
                pool.close()

    def compete_async(
        self,
        benchmark: str,
        title: str,
        names: Iterable[str],
        sizes: Sizes,
        rounds: int,
        measure: Callable[[str, Tasks], Awaitable[Sample]],
        *,
        sittings: int = 1,
    ) -> Samples:
        """The same on an event loop, one for each sitting."""
        self.headline(f"{benchmark}: {title}")
        samples: Samples = {}
        for part in shares(rounds, sittings):
            found = asyncio.run(self._sit_async(benchmark, names, sizes, part, measure))
            for name, each in found.items():
                samples.setdefault(name, []).extend(each)
        return samples

    async def _sit_async(
        self,
        benchmark: str,
        names: Iterable[str],
        sizes: Sizes,
        rounds: int,
        measure: Callable[[str, Tasks], Awaitable[Sample]],
    ) -> Samples:
        opened: dict[str, Tasks] = {}
        try:
            for name in names:
                with self._optional(benchmark, name):
                    opened[name] = await TASKS[name](self.server.dsn, sizes)
            samples: Samples = {name: [] for name in opened}
            for number in range(-1, rounds):
                for name in order(list(opened), max(number, 0)):
                    self.say(f"  round {number + 1} of {rounds}: {name}")
                    sample = await measure(name, opened[name])
                    if number >= 0:
                        samples[name].append(sample)
            self.say("")
            return samples
        finally:
            for pool in opened.values():
                await pool.close()

    def one_by_one(
        self, benchmark: str, title: str, names: Iterable[str], rounds: int, measure: Callable[[str], Sample]
    ) -> Samples:
        """`measure` opens and closes its contestant itself, and has the server to itself."""
        self.headline(f"{benchmark}: {title}")
        samples: Samples = {name: [] for name in names}
        for number in range(rounds):
            for name in order(list(samples), number):
                self.say(f"  round {number + 1} of {rounds}: {name}")
                missing = True
                with self._optional(benchmark, name):
                    samples[name].append(measure(name))
                    missing = False
                if missing:
                    del samples[name]
        self.say("")
        return samples
