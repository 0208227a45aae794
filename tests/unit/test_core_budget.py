"""The budget of one server: room for whoever needs it, fair shares when there is none."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.core.budget import REFUSED_S, TURN_S, Budget, Cap, max_min
from cenote.core.growth import DIAL_GATE
from cenote.core.machine import CLOSE, GRANT, OPEN, RESET, SERVE, Machine
from cenote.core.slot import Slot


class Server:
    """Pools of one server whose shell does its work at once: dials and closes take no time unless told so."""

    def __init__(self, limit: int, *, max_idle: int | None = None, most: int | None = None) -> None:
        self.now = 1000.0
        self.budget = Budget(limit, limit if max_idle is None else max_idle, random.Random(7).random)
        self.pools: list[Machine] = []
        self.leases: dict[Machine, list[Slot]] = {}
        self.most = 0
        self.asked = False
        self.slow = False  # dials end when `let_in` says so
        self.dials: list[tuple[Machine, Slot]] = []

    def pool(self, max_size: int = 10, *, min_size: int = 0, floor: int = 1, caps: Any = ()) -> Machine:
        m = Machine(min_size, max_size, 10_000, 300.0, 1800.0, 0.0, "off", random.Random(3).random)
        self.budget.join(m, floor, caps)
        self.pools.append(m)
        self.leases[m] = []
        m.start(self.now)
        self.settle()
        return m

    def ask(self, m: Machine, count: int = 1) -> None:
        for _ in range(count):
            got = m.acquire(self.now, 600.0)
            if isinstance(got, Slot):
                self.leases[m].append(got)
        self.settle()

    def release(self, m: Machine, count: int = 1) -> None:
        for _ in range(count):
            m.release(self.leases[m].pop(0), self.now)
            self.settle()

    def settle(self) -> None:
        """Do all work there is, and look whether the bound holds."""
        while any(m.effects for m in self.pools) or self.asked:
            for m in self.pools:
                effects, m.effects = m.effects, []
                for what, whom in effects:
                    if what == OPEN and m.dial_needed(whom, self.now):
                        if self.slow:
                            self.dials.append((m, whom))
                        else:
                            m.dialed(whom, self.now)
                    elif what == GRANT:
                        self.leases[m].append(m.accept(whom))
                    elif what == CLOSE:
                        m.closed(whom, self.now)
                    elif what == RESET:
                        m.reset_done(whom, self.now)
                    elif what == SERVE:
                        self.asked = True
            if self.asked and not any(m.effects for m in self.pools):
                self.asked = False
                self.budget.serve(self.now)
            self.most = max(self.most, self.budget.used)
        self.budget.check()

    def let_in(self) -> None:
        """All dials under way end."""
        dials, self.dials = self.dials, []
        for m, slot in dials:
            m.dialed(slot, self.now)
        self.settle()

    def tick(self, seconds: float = 1.0) -> None:
        self.now += seconds
        for m in self.pools:
            m.tick(self.now)
        self.budget.tick(self.now)
        self.settle()

    def sizes(self) -> list[int]:
        return [m.size for m in self.pools]


# -- shares ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "wanted", "shares"),
    [
        (10, [(1, 2), (1, 3)], [2, 3]),
        (10, [(1, 100), (1, 2)], [8, 2]),
        (10, [(1, 100), (1, 100), (1, 1)], [5, 4, 1]),
        (2, [(1, 5), (1, 5), (1, 5)], [1, 1, 0]),
        (9, [(4, 10), (1, 10), (1, 10)], [4, 3, 2]),
        (0, [(1, 1)], [0]),
        (5, [], []),
    ],
)
def test_shares_are_max_min_fair_in_whole_numbers(limit: int, wanted: Any, shares: list[int]) -> None:
    assert [share for share, _ in max_min(limit, wanted)] == shares


@given(
    st.integers(0, 60),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)).map(lambda pair: (min(pair), pair[1])), max_size=12),
)
def test_nobody_gets_more_than_it_wants_and_nobody_less_than_one_who_has_more(limit: int, wanted: Any) -> None:
    shares = [share for share, _ in max_min(limit, wanted)]
    assert sum(shares) == min(limit, sum(most for _, most in wanted))
    assert all(share <= most for share, (_, most) in zip(shares, wanted, strict=True))
    for share, (_, most) in zip(shares, wanted, strict=True):
        if share < most:  # unsatisfied: nobody has two more, but by its own floor
            for other, (least, _) in zip(shares, wanted, strict=True):
                assert other <= max(share + 1, least)


# -- room -----------------------------------------------------------------------------------------------------


def test_anybody_may_use_the_room_there_is_and_nobody_more() -> None:
    server = Server(8)
    a, b = server.pool(), server.pool()
    server.ask(a, 10)
    assert server.sizes() == [8, 0]
    server.ask(b, 1)
    assert server.most == 8


def test_a_pool_that_has_less_than_its_share_gets_the_next_connection_that_comes_back() -> None:
    server = Server(8)
    greedy, quiet = server.pool(), server.pool()
    server.ask(greedy, 30)
    server.ask(quiet, 1)
    assert server.sizes() == [8, 0]
    server.release(greedy)
    assert server.sizes() == [7, 1]
    assert len(server.leases[quiet]) == 1
    server.release(greedy, 5)
    assert server.sizes() == [7, 1], "it took more than it needed"


def test_two_greedy_pools_end_with_half_each() -> None:
    server = Server(8)
    a, b = server.pool(), server.pool()
    server.ask(a, 100)
    server.ask(b, 100)
    for _ in range(20):
        server.now += 0.05
        server.release(a if len(server.leases[a]) >= len(server.leases[b]) else b)
    assert server.sizes() == [4, 4]


def test_idle_connections_above_the_share_are_taken_at_once_and_later_all_above_the_floor() -> None:
    server = Server(6)
    a, b = server.pool(), server.pool()
    server.ask(a, 6)
    server.release(a, 6)
    server.ask(b, 6)
    assert server.sizes() == [3, 3]
    for _ in range(4):
        server.tick()
    assert server.sizes() == [1, 5], "to the floor, and no further"


def test_who_has_his_share_already_takes_only_what_has_idled_for_a_while() -> None:
    server = Server(4)
    a, b = server.pool(floor=0), server.pool(floor=0)
    server.ask(a, 2)
    server.ask(b, 2)
    server.release(a, 2)
    server.ask(b, 2)
    assert server.sizes() == [2, 2]
    server.tick(1.1)
    assert server.sizes()[1] > 2


def test_what_a_quiet_pool_does_not_use_any_more_goes_back_to_the_busy_one() -> None:
    server = Server(8)
    greedy, quiet = server.pool(), server.pool()
    server.ask(greedy, 1000)
    server.ask(quiet, 3)
    for _ in range(6):
        server.release(greedy)
    assert server.sizes() == [5, 3]
    server.release(quiet, 3)
    for _ in range(5):
        server.tick()
    assert server.sizes() == [7, 1]


def test_with_fewer_connections_than_pools_they_take_turns_and_nobody_is_left_out() -> None:
    server = Server(4)
    pools = [server.pool(max_size=5) for _ in range(12)]
    served: set[int] = set()
    for m in pools:
        server.ask(m, 200)
    for _ in range(60):
        server.now += TURN_S / 2
        for number, m in enumerate(pools):
            if server.leases[m]:
                served.add(number)
                server.release(m)
        server.tick(0.01)
    assert served == set(range(12))
    assert server.most <= 4


def test_a_pool_out_of_room_stands_in_line_before_those_who_come_later() -> None:
    server = Server(2)
    a, b, c = (server.pool() for _ in range(3))
    server.ask(a, 2)
    server.ask(b)
    server.ask(c)
    server.release(a)
    assert (len(server.leases[b]), len(server.leases[c])) == (1, 0)


def test_3_greedy_pools_among_200_cannot_starve_the_others() -> None:
    server = Server(60)
    pools = [server.pool(max_size=30) for _ in range(200)]
    greedy, quiet = pools[:3], pools[3:]
    for m in greedy:
        server.ask(m, 10_000)
    assert sum(server.sizes()[:3]) == 60
    choose = random.Random(11)
    waits: list[int] = []
    asked: dict[Machine, int] = {}
    for turn in range(1500):
        server.now += 0.01
        for m in greedy:
            for _ in range(min(3, len(server.leases[m]))):
                server.release(m)
        for m in list(asked):
            if server.leases[m]:
                waits.append(turn - asked.pop(m))
                server.release(m)
        m = choose.choice(quiet)
        if m not in asked:
            asked[m] = turn
            server.ask(m)
    assert server.most <= 60
    assert len(waits) > 1300
    assert max(waits) <= 20, "somebody quiet waited for long"
    shares = [m.size for m in greedy]
    assert max(shares) - min(shares) <= 2, f"the greedy are not equals: {shares}"


# -- caps, the idle bound, refusals ---------------------------------------------------------------------------


def test_the_pools_of_one_cap_share_it_fairly_and_leave_the_rest_to_others() -> None:
    server = Server(20)
    cap = Cap(4)
    a, b, other = server.pool(caps=(cap,)), server.pool(caps=(cap,)), server.pool()
    server.ask(a, 30)
    server.ask(b, 30)
    server.ask(other, 10)
    assert server.sizes() == [4, 0, 10]
    server.release(a, 2)
    assert sum(server.sizes()[:2]) <= 4
    for _ in range(10):
        server.now += 0.05
        server.release(a if len(server.leases[a]) >= len(server.leases[b]) else b)
    assert sorted(server.sizes()) == [2, 2, 10]


def test_above_max_idle_the_longest_idle_are_closed_but_not_below_the_floor() -> None:
    server = Server(20, max_idle=5)
    a, b = server.pool(), server.pool()
    server.ask(a, 8)
    server.now += 1
    server.ask(b, 8)
    server.release(a, 8)
    server.now += 1
    server.release(b, 8)
    server.tick()
    assert server.sizes() == [1, 4]


def test_the_warm_minima_keep_within_max_idle_and_the_gate() -> None:
    server = Server(40, max_idle=10)
    for _ in range(30):
        server.pool(min_size=2)
    for _ in range(5):
        server.tick()
    assert sum(server.sizes()) <= 10
    assert server.budget.gate.pending == 0


def test_F10_a_server_that_refuses_is_asked_for_no_more_for_a_minute_and_waiters_stay() -> None:
    server = Server(20)
    m = server.pool(max_size=20)
    server.ask(m, 6)
    server.budget.refused(server.now)
    m.release_broken(server.leases[m].pop(), server.now, "server_closed", "private")
    server.settle()
    assert server.budget.limit == 5
    server.ask(m, 3)
    assert (m.size, m.waiting.size) == (5, 3)
    server.tick(REFUSED_S)
    server.tick()
    assert (m.size, m.waiting.size) == (8, 0)


def test_a_bound_that_is_lowered_is_met_by_the_idle_first_then_by_those_that_come_back() -> None:
    server = Server(10)
    a, b = server.pool(), server.pool()
    server.ask(a, 6)
    server.ask(b, 4)
    server.release(b, 3)
    server.budget.resize(server.now, 5, 5)
    server.tick()
    assert sum(server.sizes()) == 7
    server.release(a, 3)
    server.tick()
    assert server.budget.used <= 5


def test_the_gate_is_the_servers_not_each_pools() -> None:
    budget = Budget(100, 100, random.Random(1).random)
    pools = []
    for _ in range(10):
        m = Machine(0, 10, 100, 300.0, 1800.0, 0.0, "off", random.Random(2).random)
        budget.join(m, 1)
        pools.append(m)
        m.acquire(1000.0, 60.0)
        m.acquire(1000.0, 60.0)
    dials = [(m, whom) for m in pools for what, whom in m.effects if what == OPEN]
    assert len(dials) == DIAL_GATE
    for m in pools:
        m.effects.clear()
    m, slot = dials[0]
    assert m.dial_needed(slot, 1000.0)
    m.dial_failed(slot, 1000.5, "destination")
    served = budget.serve(1000.5)
    assert not [what for one in served for what, _ in one.effects if what == OPEN], "dialed a server that is down"
    budget.check()


def test_pools_that_wait_at_the_gate_get_their_share_one_after_the_other_and_nobody_more() -> None:
    server = Server(12)
    pools = [server.pool() for _ in range(6)]
    server.slow = True
    for m in pools:
        server.ask(m, 50)
    while server.dials:
        assert len(server.dials) <= DIAL_GATE
        server.let_in()
        for m in pools:
            server.release(m, len(server.leases[m]))
    assert server.sizes() == [2] * 6
    assert server.budget.taken == DIAL_GATE - 2  # what the first got while nobody else asked


def test_while_there_is_room_for_all_that_the_gate_lets_in_nothing_is_taken() -> None:
    server = Server(12)
    pools = [server.pool(1) for _ in range(40)]
    server.ask(pools[0])
    server.release(pools[0])
    server.slow = True
    for m in pools[1:]:
        server.ask(m)
    assert (server.budget.used, server.budget.taken) == (1 + DIAL_GATE, 0)
    while server.dials:
        server.let_in()
    assert (server.budget.used, server.sizes()[0]) == (12, 0)


def test_a_user_who_is_refused_does_not_hold_up_the_others() -> None:
    budget = Budget(100, 100, random.Random(1).random)
    bad, good = (Machine(0, 10, 100, 300.0, 1800.0, 0.0, "off", random.Random(2).random) for _ in range(2))
    budget.join(bad, 1)
    budget.join(good, 1)
    bad.acquire(1000.0, 60.0)
    slot = next(whom for what, whom in bad.effects if what == OPEN)
    assert bad.dial_needed(slot, 1000.0)
    bad.dial_failed(slot, 1000.0, "permanent")
    good.acquire(1000.0, 60.0)
    assert [what for what, _ in good.effects if what == OPEN] == [OPEN]
