"""CoDel: a standing queue is shed, a burst is not."""

import pytest
from core_shell import Shell

from cenote.core.codel import INTERVAL_S, TARGET_S, Codel
from cenote.core.machine import GRANT, REFUSE
from cenote.core.slot import Slot


def test_a_queue_is_standing_only_after_an_interval_whose_shortest_wait_was_above_the_target() -> None:
    codel = Codel()
    assert not codel.judge(1.0, 100.0)
    assert not codel.judge(1.0, 100.0 + INTERVAL_S * 0.99)
    assert codel.judge(1.0, 100.0 + INTERVAL_S)


def test_one_short_wait_in_the_interval_shows_that_the_queue_only_bursts() -> None:
    codel = Codel()
    codel.judge(1.0, 100.0)
    codel.judge(TARGET_S, 101.0)
    codel.judge(1.0, 101.5)
    assert not codel.judge(1.0, 102.0)


def test_in_a_standing_queue_only_who_waited_twice_the_target_is_refused() -> None:
    codel = Codel()
    codel.judge(1.0, 100.0)
    codel.judge(1.0, 102.0)
    assert not codel.judge(2 * TARGET_S, 102.1)
    assert codel.judge(2 * TARGET_S + 0.001, 102.1)


def test_a_verdict_does_not_outlive_the_silence_after_its_queue() -> None:
    codel = Codel()
    codel.judge(1.0, 100.0)
    assert not codel.judge(1.0, 102.0 + INTERVAL_S)


def overloaded(codel: str) -> tuple[Shell, Slot]:
    """One connection on loan, and callers who come faster than it returns."""
    shell = Shell(max_size=1, codel=codel)
    waiter = shell.wait()
    shell.dial_all()
    shell.take(GRANT)
    return shell, shell.m.accept(waiter)


def serve_late(shell: Shell, slot: Slot, seconds: float) -> None:
    """A caller each 0.1 s, each served after having waited for about a second."""
    for _ in range(10):
        shell.wait()
        shell.now += 0.1
    for _ in range(int(seconds * 10)):
        shell.wait()
        shell.release(slot)
        for waiter in shell.take(GRANT):
            assert shell.m.accept(waiter) is slot
        shell.now += 0.1


@pytest.mark.parametrize(("codel", "sheds", "would_shed"), [("off", 0, 0), ("shadow", 0, 1), ("on", 1, 0)])
def test_a_standing_queue_is_shed_when_on_only_counted_in_shadow_and_ignored_when_off(
    codel: str, sheds: int, would_shed: int
) -> None:
    shell, slot = overloaded(codel)
    serve_late(shell, slot, 5.0)
    shed = shell.m.refused_by.get("shed", 0)
    assert bool(shed) == bool(sheds)
    assert bool(shell.m.would_shed) == bool(would_shed)
    assert len(shell.take(REFUSE)) == shed


def test_shedding_drains_the_queue_to_waits_of_twice_the_target() -> None:
    shell, slot = overloaded("on")
    serve_late(shell, slot, 5.0)
    assert all(shell.now - waiter.since <= 2 * TARGET_S + 0.1 for waiter in shell.m.waiting)


def test_a_queue_that_nothing_leaves_is_judged_by_the_clock() -> None:
    shell, _ = overloaded("on")
    waiters = [shell.wait(timeout=1000.0) for _ in range(5)]
    shell.run(until=shell.now + 3 * INTERVAL_S)
    assert [waiter.refused for waiter in waiters] == ["shed"] * 5
    assert shell.take(REFUSE) == waiters


@pytest.mark.parametrize("codel", ["off", "shadow"])
def test_a_stuck_queue_waits_for_its_deadline_unless_shedding_is_on(codel: str) -> None:
    shell, _ = overloaded(codel)
    waiter = shell.wait(timeout=20.0)
    shell.run(until=shell.now + 19.9)
    assert not waiter.refused
    shell.run(until=shell.now + 0.1)
    assert waiter.refused == "timeout"


def test_a_burst_that_drains_is_served_whole() -> None:
    shell, slot = overloaded("on")
    for _ in range(3):
        burst = [shell.wait() for _ in range(150)]
        for _ in burst:
            shell.now += 0.01
            shell.release(slot)
            (waiter,) = shell.take(GRANT)
            shell.m.accept(waiter)
        shell.release(slot)
        assert isinstance(shell.acquire(), Slot)
        shell.run(until=shell.now + 0.5)
    assert "shed" not in shell.m.refused_by


def test_a_lease_without_waiting_clears_the_suspicion() -> None:
    shell, slot = overloaded("on")
    shell.run(until=shell.now + 10.0)
    first = shell.wait()
    shell.now += 1.0
    shell.release(slot)
    slot = shell.m.accept(first)
    shell.release(slot)
    assert isinstance(shell.acquire(), Slot)
    late = shell.wait()
    shell.run(until=shell.now + 2.5)
    shell.release(slot)
    assert late.slot is slot
    assert "shed" not in shell.m.refused_by
