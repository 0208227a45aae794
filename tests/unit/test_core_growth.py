"""Growth: how many dials the need justifies, and how soon to try again."""

import pytest
from core_shell import Shell, Simulation, new_machine

from cenote.core.growth import BACKOFF_FIRST_S, BACKOFF_MOST_S, DIAL_GATE, Gate, Growth
from cenote.core.machine import OPEN
from cenote.core.slot import NEVER


def test_no_more_dials_at_once_than_the_gate_lets_through() -> None:
    shell = Shell(max_size=50)
    for _ in range(50):
        shell.wait()
    assert len(shell.take(OPEN)) == DIAL_GATE


def test_a_finished_dial_makes_room_in_the_gate_for_the_next() -> None:
    shell = Shell(max_size=50)
    for _ in range(50):
        shell.wait()
    shell.dial(shell.take(OPEN)[0], took=0.01)
    shell.now += 1.0
    shell.tick()
    assert len(shell.take(OPEN)) == 1
    assert shell.m.connecting.size == DIAL_GATE


def test_no_more_dials_than_waiters() -> None:
    shell = Shell(max_size=50)
    for number in (1, 2, 3):
        shell.wait()
        assert shell.m.connecting.size == number


def test_the_warm_minimum_is_opened_without_anybody_waiting() -> None:
    shell = Shell(min_size=6, max_size=10)
    shell.start()
    assert shell.dial_all() == 6
    assert shell.m.opened_by == {"minimum": 6}
    assert shell.m.shelf.size() == 6


def test_a_dial_for_the_minimum_and_one_on_demand_are_counted_apart() -> None:
    shell = Shell(min_size=2, max_size=10)
    shell.wait()
    shell.dial_all()
    assert shell.m.opened_by == {"demand": 1, "minimum": 1}


@pytest.mark.parametrize("share", [0.0, 0.25, 0.999])
def test_the_pause_after_a_failure_has_full_jitter_and_doubles_from_50_ms_to_2_s(share: float) -> None:
    gate = Gate(lambda: share)
    pauses = []
    for _ in range(12):
        gate.failed(100.0)
        pauses.append(gate.retry_at - 100.0)
    expected = [share * min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2**n) for n in range(12)]
    assert pauses == pytest.approx(expected)
    assert pauses[-1] == pytest.approx(share * 2.0)


def test_a_destination_down_for_days_does_not_overflow_the_pause() -> None:
    gate = Gate(lambda: 1.0)
    for _ in range(100_000):
        gate.failed(0.0)
    assert gate.retry_at == BACKOFF_MOST_S


def test_while_the_destination_is_down_one_dial_at_a_time_probes_it_after_each_pause() -> None:
    shell = Shell(max_size=10, random=lambda: 0.5)
    for _ in range(10):
        shell.wait(timeout=100.0)
    for slot in shell.take(OPEN):
        shell.fail_dial(slot, "temporary")
    for _ in range(6):
        assert shell.take(OPEN) == []
        assert shell.now < shell.m.alarm <= shell.now + BACKOFF_MOST_S / 2
        shell.now = shell.m.alarm
        shell.tick()
        (probe,) = shell.take(OPEN)
        assert probe.opened == "probe"
        shell.fail_dial(probe, "temporary")


def test_no_dial_starts_before_the_pause_is_over_whoever_asks() -> None:
    shell = Shell(min_size=2, max_size=10, random=lambda: 1.0)
    shell.start()
    for slot in shell.take(OPEN):
        shell.fail_dial(slot, "temporary")
    shell.wait()
    shell.acquire(timeout=0.0)
    shell.tick(BACKOFF_FIRST_S / 2)
    assert shell.take(OPEN) == []


def test_the_first_dial_that_works_opens_the_gate_again() -> None:
    shell = Shell(max_size=10, random=lambda: 0.0)
    for _ in range(10):
        shell.wait()
    for slot in shell.take(OPEN):
        shell.fail_dial(slot, "temporary")
    (probe,) = shell.take(OPEN)
    shell.dial(probe, took=0.01)
    shell.tick(1.0)
    assert shell.m.connecting.size == DIAL_GATE


def test_the_need_is_asked_again_right_before_each_dial() -> None:
    shell = Shell(max_size=10)
    waiters = [shell.wait() for _ in range(3)]
    slots = shell.take(OPEN)
    shell.m.abandon(waiters[0], shell.now)
    shell.m.abandon(waiters[1], shell.now)
    assert [shell.m.dial_needed(slot, shell.now) for slot in slots] == [False, False, True]
    assert shell.m.closed_by == {"not_needed": 2}
    assert (shell.m.size, slots[0].state()) == (1, "gone")


def test_a_dial_whose_asker_left_finishes_into_the_pool() -> None:
    shell = Shell(max_size=10)
    waiter = shell.wait()
    (slot,) = shell.take(OPEN)
    assert shell.m.dial_needed(slot, shell.now)
    shell.m.abandon(waiter, shell.now)
    shell.m.dialed(slot, shell.now)
    shell.gather()
    assert slot.state() == "idle"


def test_a_dial_is_not_begun_above_a_limit_that_was_lowered_meanwhile() -> None:
    shell = Shell(max_size=4)
    for _ in range(4):
        shell.wait()
    slots = shell.take(OPEN)
    shell.m.resize(shell.now, 0, 1)
    assert [shell.m.dial_needed(slot, shell.now) for slot in slots] == [False, False, False, True]


@pytest.mark.parametrize("end", ["drain", "close"])
def test_a_dial_that_nobody_waits_for_is_not_begun_once_the_pool_drains_or_is_closed(end: str) -> None:
    shell = Shell(min_size=1, max_size=4)
    shell.start()
    (minimum,) = shell.take(OPEN)
    other = Shell(max_size=4)
    other.acquire(timeout=0.0)
    (attempt,) = other.take(OPEN)
    for each, slot in ((shell, minimum), (other, attempt)):
        if end == "drain":
            each.m.drain(each.now, each.now + 10)
        else:
            each.m.close(each.now)
        assert not each.m.dial_needed(slot, each.now)


def test_fast_leases_serve_a_spike_with_few_connections() -> None:
    """150 ms dials, 2 ms leases, 50 callers at once: the ones already open are sooner done than a dial."""
    machine = new_machine(max_size=50)
    world = Simulation(machine, dial_s=0.150, hold_s=0.002)
    for _ in range(50):
        world.ask()
    world.run()
    assert len(world.served) == 50
    assert world.opened() <= 6
    assert world.most_connecting <= DIAL_GATE
    machine.check()


def test_a_later_spike_on_a_warm_pool_opens_next_to_nothing() -> None:
    machine = new_machine(max_size=50)
    world = Simulation(machine, dial_s=0.150, hold_s=0.002)
    for _ in range(50):
        world.ask()
    world.run()
    before = world.opened()
    for _ in range(50):
        world.ask()
    world.run()
    assert machine.acquired == 100
    assert world.opened() <= before + 1


def test_slow_leases_make_the_pool_grow_to_its_limit() -> None:
    machine = new_machine(max_size=40)
    world = Simulation(machine, dial_s=0.150, hold_s=5.0)
    for _ in range(50):
        world.ask()
    world.run()
    assert len(world.served) == 50
    assert world.opened() == 40
    assert world.ended <= 0.150 * (40 / DIAL_GATE + 5) + 2 * world.hold_s, "grew slower than the gate allows"


def test_leases_that_turn_slow_are_noticed_before_one_of_them_ends() -> None:
    shell = Shell(max_size=10)
    waiter = shell.wait()
    shell.dial(shell.take(OPEN)[0], took=0.1)
    slot = shell.m.accept(waiter)
    for _ in range(100):
        shell.now += 0.001
        shell.release(slot)
        slot = shell.lease()
    shell.wait()
    assert shell.take(OPEN) == [], "a lease of a millisecond is worth waiting for"
    shell.run(until=shell.now + 0.2)
    assert len(shell.take(OPEN)) == 1


def test_a_queue_left_alone_is_looked_at_again_though_nothing_moves() -> None:
    growth = Growth(Gate(lambda: 0.0), lambda: 0.0)
    growth.dial_ended(0.1)
    growth.lease_ended(0.001)
    assert growth.wanted(5.0, 0, 10, 0, 1, 1, 5.0) == 0
    assert 5.0 < growth.look_at <= 5.1
    assert growth.wanted(5.2, 0, 10, 0, 1, 1, 5.0) == 1
    assert growth.look_at == NEVER


def test_averages_follow_what_dials_and_leases_last_lately() -> None:
    growth = Growth(Gate(lambda: 0.0), lambda: 0.0)
    for _ in range(100):
        growth.dial_ended(0.2)
        growth.lease_ended(0.01)
    assert (growth.dial_s, growth.hold_s) == (pytest.approx(0.2), pytest.approx(0.01))
    for _ in range(100):
        growth.dial_ended(0.1)
        growth.lease_ended(0.5)
    assert (growth.dial_s, growth.hold_s) == (pytest.approx(0.1, rel=0.01), pytest.approx(0.5, rel=0.01))
