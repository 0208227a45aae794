"""A storm, simulated: discrete events on the real pool machine under a virtual clock.

Everything a pool decides here is decided by `core/machine.py`, and with a budget by `core/budget.py`: the code
that runs in a program and in the proxy. Simulated is the rest: the clock, the requests, and the server
(`measure/station.py`). One way a run: a connection for each request, local pools, local pools under a budget, or
one proxy. Same seed, same result.
"""

import random
from collections import Counter
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

import numpy as np

from cenote.core.budget import Budget
from cenote.core.machine import (
    CLOSE,
    CONNECTION,
    DESTINATION,
    GRANT,
    OPEN,
    PEEK,
    PING,
    REFUSE,
    SERVE,
    WAKE,
    Machine,
)
from cenote.core.slot import NEVER, Slot
from cenote.measure.outcome import Outcome, Sample
from cenote.measure.scenario import Requests, Scenario, through
from cenote.measure.station import Station

TEMPORARY = "temporary"  # a word of cenote.reasons.Failure: the server is full now
_MAX_LIFETIME_S, _CHECK_AFTER_S = 1800.0, 30.0  # the defaults of a pool
_IDLE_SHARE = 5 / 7  # of the budget, as the proxy's defaults of 50 and 70 percent
_FLOOR_SHARE = 0.5  # of an equal share of the budget: what a pool has a right to first
_SERVE_EVERY_S = 0.02  # while somebody is hungry, as the proxy does
_SERVE_POOL_S = 10e-6  # what a division costs for each pool: whoever divides begins no other before it has ended
_TICK_EVERY_S = 1.0
_DRAIN_S = 30.0
_SAMPLES = 200
_LATE_S = 60.0  # what has not ended so long after the last request never will


class Simulation:
    """One way through one scenario."""

    def __init__(self, scenario: Scenario, way: str, requests: Requests) -> None:
        costs = scenario.costs
        self.now = 0.0
        self._scenario = scenario
        self._way = way
        self._asked: list[float] = requests.at_s.tolist()
        self._work: list[float] = requests.work_s.tolist()
        self._wait: list[float] = requests.wait_s.tolist()
        self._instance: list[int] = requests.instance.tolist()
        self._arrive: list[float] = through(scenario, requests).tolist() if way == "proxy" else self._asked
        self._back_s = costs.hop_ms / 2e3 if way == "proxy" else 0.0
        self._connect_s, self._connect_wait_s = costs.connect_ms / 1e3, costs.connect_wait_ms / 1e3
        self._fork_s, self._fork_free = costs.fork_ms / 1e3, 0.0
        self._close_s = costs.close_ms / 1e3
        self._timeout_s = scenario.clients.timeout_s

        self._station = Station(scenario.server.cores, costs.contention, costs.coherency, costs.law_to)
        self._usable = scenario.usable
        self._connections = 0
        self._up = True
        self._life = 0  # of the server; what began in an earlier one is lost
        self._opened = self._peak = self._rejected = 0

        self._agenda: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._ticket = 0
        self._ended_s: list[float] = [-1.0] * len(self._asked)
        self._answered = 0
        self._lost = 0  # refused or failed
        self._last = 0.0
        self._refused: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._samples: list[Sample] = []
        self._seen = (0, 0)
        self._events = 0

        chance = random.Random(scenario.seed)
        self._random = chance.random
        self.budget = self._new_budget() if way == "budget" else None
        self._serving = False
        self._served = -NEVER
        pools = {"none": 0, "proxy": 1}.get(way, scenario.clients.instances)
        self._machines = [self._new_machine() for _ in range(pools)]
        self.machines = list(self._machines)

    # -- the run --------------------------------------------------------------------------------------------

    def run(self, tell: Callable[[int], None] = lambda _: None) -> Outcome:
        """Everything, to the end. `tell` is called a hundred times or so with the requests that have ended."""
        self._arm()
        arrive, agenda, station = self._arrive, self._agenda, self._station
        number, next_one = len(arrive), 0
        total, every = number, max(1000, number // 100)
        last = (arrive[-1] if number else 0.0) + self._timeout_s + _LATE_S
        ask = self._ask_directly if self._way == "none" else self._ask_pool
        events = 0
        while self._answered + self._lost < total:
            asks = arrive[next_one] if next_one < number else NEVER
            soonest = station.soonest
            due = agenda[0][0] if agenda else NEVER
            events += 1
            if asks <= soonest and asks <= due:
                self.now = asks
                ask(next_one)
                next_one += 1
                if next_one % every == 0:
                    tell(self._answered + self._lost)
            elif soonest <= due:
                self.now = soonest
                what, args = station.pop()
                what(*args)
            else:
                self.now, _, what, args = heappop(agenda)
                if self.now > last:
                    break
                what(*args)
        self._events = events
        return self._outcome()

    def _outcome(self) -> Outcome:
        ended = np.array(self._ended_s)
        done = ended >= 0
        return Outcome(
            way=self._way,
            requests=len(self._asked),
            latency_s=(ended - np.array(self._asked))[done],
            refused=dict(self._refused),
            failed=dict(self._failed),
            unfinished=len(self._asked) - self._answered - self._lost,
            opened=self._opened,
            peak=self._peak,
            rejected=self._rejected,
            # What of a measured law is CPU, and what is locks, nobody has measured.
            cpu_s=None if self._scenario.costs.law_to else self._station.busy_s,
            seconds=self._last,
            samples=tuple(self._samples),
            events=self._events,
        )

    # -- requests -------------------------------------------------------------------------------------------

    def _ask_directly(self, request: int) -> None:
        self._dial(self._dialed_directly, request)

    def _dialed_directly(self, failure: str, life: int, request: int) -> None:
        if failure == TEMPORARY:
            self._refuse("too_many_connections")
        elif failure or life != self._life:
            self._fail("server_down")
        else:
            self._station.add(self.now, self._work[request], (self._worked, (request, None, None, life)))

    def _ask_pool(self, request: int) -> None:
        machine = self._machines[self._instance[request] if self._way != "proxy" else 0]
        got = machine.acquire(self.now, self._timeout_s, None, request)
        if isinstance(got, Slot):
            self._query(request, got, machine)
        elif got.refused:
            self._refuse(got.refused)
        if machine.effects:
            self._perform(machine)

    def _query(self, request: int, slot: Slot, machine: Machine) -> None:
        self._station.add(self.now, self._work[request], (self._worked, (request, slot, machine, self._life)))

    def _worked(self, request: int, slot: Slot | None, machine: Machine | None, life: int) -> None:
        wait_s = self._wait[request]
        if wait_s > 0:
            self._ticket += 1
            heappush(
                self._agenda, (self.now + wait_s, self._ticket, self._answered_by, (request, slot, machine, life))
            )
        else:
            self._answered_by(request, slot, machine, life)

    def _answered_by(self, request: int, slot: Slot | None, machine: Machine | None, life: int) -> None:
        alive = life == self._life
        if alive:
            self._answered += 1
            self._ended_s[request] = self._last = self.now + self._back_s
        else:
            self._fail("connection_lost")
        if slot is None or machine is None:
            if alive:
                self._at(self.now + self._close_s, self._let_go, life)
            return
        if alive:
            machine.release(slot, self.now)
        else:
            machine.release_broken(slot, self.now, "broken", CONNECTION)
        if machine.effects:
            self._perform(machine)

    def _refuse(self, reason: str) -> None:
        self._refused[reason] += 1
        self._lost += 1
        self._last = self.now

    def _fail(self, reason: str) -> None:
        self._failed[reason] += 1
        self._lost += 1
        self._last = self.now

    # -- the server -----------------------------------------------------------------------------------------

    def _dial(self, then: Callable[..., None], *args: Any) -> None:
        """Ask for a connection; `then(failure, life, *args)` when it is there, or refused."""
        if not self._up:
            self._at(self.now + self._connect_wait_s, then, DESTINATION, self._life, *args)
            return
        # One process makes a session's process before anybody knows whether there is a place for it.
        self._fork_free = max(self.now, self._fork_free) + self._fork_s
        self._at(self._fork_free, self._forked, then, self._life, args)

    def _forked(self, then: Callable[..., None], life: int, args: tuple[Any, ...]) -> None:
        if life != self._life:
            then(DESTINATION, life, *args)
        elif self._connections >= self._usable:
            self._rejected += 1
            then(TEMPORARY, life, *args)
        else:
            self._connections += 1
            self._opened += 1
            self._peak = max(self._peak, self._connections)
            self._station.add(self.now, self._connect_s, (self._greet, (then, life, args)))

    def _greet(self, then: Callable[..., None], life: int, args: tuple[Any, ...]) -> None:
        failure = "" if life == self._life else DESTINATION
        self._at(self.now + self._connect_wait_s, then, failure, life, *args)

    def _let_go(self, life: int) -> None:
        if life == self._life:
            self._connections -= 1

    def _stop_server(self, down_s: float) -> None:
        """Every session ends now: what runs is lost, idle connections are seen to close."""
        self._life += 1
        self._up = False
        self._fork_free = self.now
        self._connections = 0
        for what, args in self._station.clear(self.now):
            self._at(self.now, what, *args)
        for machine in self.machines:
            while (slot := machine.shelf.oldest()) is not None:
                machine.idle_lost(slot, self.now, "server_closed", CONNECTION)
            self._perform(machine)
        self._at(self.now + down_s, self._start_server)

    def _start_server(self) -> None:
        self._up = True

    # -- the pools ------------------------------------------------------------------------------------------

    def _perform(self, machine: Machine) -> None:
        """Do what the machine wants done; it may want more then."""
        effects = machine.effects
        while effects:
            todo = effects[:]
            effects.clear()
            for kind, whom in todo:
                if kind == GRANT:
                    self._query(whom.data, machine.accept(whom), machine)
                elif kind == WAKE:
                    if machine.alarm != NEVER:
                        self._at(max(self.now, machine.alarm), self._tick, machine)
                elif kind == OPEN:
                    if machine.dial_needed(whom, self.now):
                        self._dial(self._dialed, machine, whom)
                elif kind == CLOSE:
                    self._at(self.now + self._close_s, self._closed, machine, whom)
                elif kind == REFUSE:
                    self._refuse(whom.refused)
                elif kind == SERVE:
                    self._serve_at(self.now)
                elif kind in (PING, PEEK):
                    self._at(self.now, self._checked, machine, whom, kind == PING)

    def _dialed(self, failure: str, life: int, machine: Machine, slot: Slot) -> None:
        slot.data = life
        if failure or life != self._life:
            if failure == TEMPORARY and self.budget is not None:
                self.budget.refused(self.now)
            machine.dial_failed(slot, self.now, failure or DESTINATION)
        else:
            machine.dialed(slot, self.now)
        self._perform(machine)

    def _closed(self, machine: Machine, slot: Slot) -> None:
        self._let_go(slot.data)
        machine.closed(slot, self.now)
        self._perform(machine)

    def _checked(self, machine: Machine, slot: Slot, pinged: bool) -> None:
        if slot.data == self._life:
            machine.check_passed(slot, self.now, pinged)
        else:
            machine.check_failed(slot, self.now, "check_failed", CONNECTION)
        self._perform(machine)

    def _tick(self, machine: Machine) -> None:
        if machine.alarm <= self.now:
            machine.tick(self.now)
            self._perform(machine)

    def _new_machine(self) -> Machine:
        clients = self._scenario.clients
        proxy = self._way == "proxy"
        size = self._scenario.proxy_size if proxy else clients.pool_size
        machine = Machine(
            min(clients.min_size, size),
            size,
            clients.max_waiting,
            clients.idle_timeout_s,
            _MAX_LIFETIME_S,
            _CHECK_AFTER_S,
            "off",
            self._random,
        )
        if self.budget is not None:
            self.budget.join(machine, int(_FLOOR_SHARE * self._scenario.budget / clients.instances))
        return machine

    # -- the budget -----------------------------------------------------------------------------------------

    def _new_budget(self) -> Budget:
        most = self._scenario.budget
        return Budget(most, max(1, int(most * _IDLE_SHARE)), self._random)

    def _serve_at(self, when: float) -> None:
        if not self._serving:
            self._serving = True
            self._at(max(when, self._served + _SERVE_POOL_S * len(self.machines)), self._serve)

    def _serve(self) -> None:
        assert self.budget is not None
        self._serving = False
        self._served = self.now
        for machine in self.budget.serve(self.now):
            self._perform(machine)
        if self.budget.hungry:
            self._serve_at(self.now + _SERVE_EVERY_S)

    def _tick_budget(self) -> None:
        assert self.budget is not None
        for machine in self.budget.tick(self.now):
            self._perform(machine)
        self._at(self.now + _TICK_EVERY_S, self._tick_budget)

    # -- what happens by itself -----------------------------------------------------------------------------

    def _at(self, when: float, what: Callable[..., None], *args: Any) -> None:
        self._ticket += 1
        heappush(self._agenda, (when, self._ticket, what, args))

    def _arm(self) -> None:
        scenario = self._scenario
        for machine in self._machines:
            machine.start(0.0)
            self._perform(machine)
        if self.budget is not None:
            self._at(_TICK_EVERY_S, self._tick_budget)
        if scenario.restart is not None:
            self._at(scenario.restart.at_s, self._stop_server, scenario.restart.down_s)
        if scenario.deploy is not None and self._way in ("local", "budget"):
            for number in range(len(self._machines)):
                late = scenario.deploy.spread_s * number / len(self._machines)
                self._at(scenario.deploy.at_s + late, self._deploy, number)
        self._sample(scenario.load.seconds / _SAMPLES)

    def _deploy(self, number: int) -> None:
        """A new instance starts beside the old one, takes over its load, and the old one drains."""
        deploy = self._scenario.deploy
        assert deploy is not None
        machine = self._new_machine()
        self.machines.append(machine)
        machine.start(self.now)
        self._perform(machine)
        old = self._machines[number]
        self._at(self.now + deploy.ready_s, self._machines.__setitem__, number, machine)
        self._at(self.now + max(deploy.ready_s, deploy.overlap_s), self._drain, old)

    def _drain(self, machine: Machine) -> None:
        machine.drain(self.now, self.now + _DRAIN_S)
        self._perform(machine)

    def _sample(self, every_s: float) -> None:
        waiting = sum(machine.waiting.size for machine in self.machines)
        answered, lost = self._answered - self._seen[0], self._lost - self._seen[1]
        self._seen = (self._answered, self._lost)
        self._samples.append(Sample(self.now, self._connections, waiting, answered, lost))
        self._at(self.now + every_s, self._sample, every_s)


def simulate(
    scenario: Scenario, way: str, requests: Requests | None = None, tell: Callable[[int], None] = lambda _: None
) -> Outcome:
    """One way through the scenario. `tell` is called a hundred times or so, with the requests that have ended."""
    return Simulation(scenario, way, requests or scenario.requests()).run(tell)
