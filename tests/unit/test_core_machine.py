"""The pool machine in scenes: every row of its table, and each promise about order, time and failure."""

import re
from collections.abc import Callable

import pytest
from core_shell import Shell

from cenote.core import machine as machine_module
from cenote.core.machine import CLOSE, GRANT, LOOKS, OPEN, PASSES, PEEK, PING, REFUSE, RESET, Machine
from cenote.core.slot import NEVER, Slot, Waiter


def granted(shell: Shell) -> list[Waiter]:
    return shell.take(GRANT)


# -- the table ------------------------------------------------------------------------------------------------


def connecting(shell: Shell) -> Slot:
    shell.wait()
    return shell.take(OPEN)[0]


def dialing(shell: Shell) -> Slot:
    slot = connecting(shell)
    assert shell.m.dial_needed(slot, shell.now)
    return slot


def idle(shell: Shell) -> Slot:
    return shell.filled(1)[0]


def leased(shell: Shell) -> Slot:
    idle(shell)
    return shell.lease()


def resetting(shell: Shell) -> Slot:
    slot = leased(shell)
    shell.touch(slot)
    return slot


def checking(shell: Shell) -> Slot:
    slot = idle(shell)
    shell.run(until=shell.now + 31.0)
    assert shell.take(PING) == [slot]
    return slot


def closing(shell: Shell) -> Slot:
    slot = leased(shell)
    shell.break_lease(slot, "private")
    return slot


def gone(shell: Shell) -> Slot:
    slot = closing(shell)
    shell.close_all()
    return slot


SCENES = {f.__name__: f for f in (connecting, idle, leased, resetting, checking, closing, gone)}


def nobody_waits(shell: Shell, slot: Slot) -> None:
    for waiter in list(shell.m.waiting):
        shell.m.abandon(waiter, shell.now)


def somebody_waits(shell: Shell, slot: Slot) -> None:
    if not shell.m.waiting.size:
        shell.m.resize(shell.now, 0, shell.m.size)
        shell.wait()


def its_life_is_over(shell: Shell, slot: Slot) -> None:
    shell.now += 10_000.0


def the_epoch_is_over(shell: Shell, slot: Slot) -> None:
    shell.m.refresh(shell.now)


def the_limit_fell(shell: Shell, slot: Slot) -> None:
    shell.m.resize(shell.now, 0, 0)


def it_drains(shell: Shell, slot: Slot) -> None:
    nobody_waits(shell, slot)
    shell.m.drain(shell.now, shell.now + 60.0)


def it_closed(shell: Shell, slot: Slot) -> None:
    shell.m.close(shell.now)


PLACES: list[tuple[Callable[[Shell, Slot], None], str, str]] = [
    (nobody_waits, "idle", ""),
    (somebody_waits, "leased", ""),
    (its_life_is_over, "closing", "max_lifetime"),
    (the_epoch_is_over, "closing", "stale"),
    (the_limit_fell, "closing", "surplus"),
    (it_drains, "closing", "draining"),
    (it_closed, "closing", "pool_closed"),
]
PLACED = {
    "dialed": (dialing, lambda m, slot, now: m.dialed(slot, now)),
    "release": (leased, lambda m, slot, now: m.release(slot, now)),
    "reset_done": (resetting, lambda m, slot, now: m.reset_done(slot, now)),
    "check_passed": (checking, lambda m, slot, now: m.check_passed(slot, now, True)),
}


@pytest.mark.parametrize(
    ("name", "given"),
    [
        pytest.param(name, given, id=f"{name}-{given[0].__name__}")
        for name in PLACED
        for given in PLACES
        if (name, given[0]) != ("dialed", its_life_is_over)  # nothing is born old
    ],
)
def test_a_usable_connection_goes_to_a_waiter_or_the_shelf_or_is_closed_for_a_reason(
    name: str, given: tuple[Callable[[Shell, Slot], None], str, str]
) -> None:
    scene, give = PLACED[name]
    circumstance, state, reason = given
    shell = Shell(max_size=2)
    slot = scene(shell)
    circumstance(shell, slot)
    give(shell.m, slot, shell.now)
    shell.gather()
    assert (slot.state(), slot.reason) == (state, reason)
    assert (slot in shell.take(CLOSE)) == (state == "closing")


def break_it(m: Machine, slot: Slot, now: float) -> None:
    m.release_broken(slot, now, "broken", "private")


def fail_check(m: Machine, slot: Slot, now: float) -> None:
    m.check_failed(slot, now, "check_failed", "private")


@pytest.mark.parametrize(
    ("name", "scene", "give", "state", "effect"),
    [
        ("acquire", idle, lambda m, s, now: m.acquire(now, 0.0), "leased", None),
        ("acquire", idle, lambda m, s, now: m.acquire(now + 9999.0, 0.0), "closing", CLOSE),
        ("dial_needed", connecting, lambda m, s, now: m.close(now) or m.dial_needed(s, now), "gone", None),
        ("dial_failed", dialing, lambda m, s, now: m.dial_failed(s, now, "temporary"), "gone", None),
        ("release_touched", leased, lambda m, s, now: m.release_touched(s, now), "resetting", RESET),
        ("release_broken", leased, break_it, "closing", CLOSE),
        ("reset_failed", resetting, lambda m, s, now: m.reset_failed(s, now, "private"), "closing", CLOSE),
        ("tick", idle, lambda m, s, now: m.tick(now + 30.0), "checking", PING),
        ("tick", idle, lambda m, s, now: m.tick(now + 9999.0), "closing", CLOSE),
        ("check_failed", checking, fail_check, "closing", CLOSE),
        ("refresh", idle, lambda m, s, now: m.refresh(now), "closing", CLOSE),
        ("drain", idle, lambda m, s, now: m.drain(now, now + 9.0), "closing", CLOSE),
        ("close", idle, lambda m, s, now: m.close(now), "closing", CLOSE),
        ("resize", idle, lambda m, s, now: m.resize(now, 0, 0), "closing", CLOSE),
        ("closed", closing, lambda m, s, now: m.closed(s, now), "gone", None),
    ],
)  # fmt: skip
def test_each_other_row_of_the_table_moves_the_slot_and_tells_the_shell(
    name: str, scene: Callable[[Shell], Slot], give: Callable[..., object], state: str, effect: str | None
) -> None:
    shell = Shell()
    slot = scene(shell)
    shell.take(CLOSE)
    give(shell.m, slot, shell.now)
    shell.gather()
    assert slot.state() == state
    if effect is not None:
        assert shell.take(effect) == [slot]


@pytest.mark.parametrize(("failure", "state"), [("connection", "checking"), ("destination", "closing")])
def test_a_failure_of_one_connection_moves_the_idle_ones_as_the_table_says(failure: str, state: str) -> None:
    shell = Shell()
    other, slot = shell.filled(2)
    assert shell.lease() is slot
    shell.break_lease(slot, failure)
    assert other.state() == state


def test_growth_brings_a_slot_into_connecting() -> None:
    assert connecting(Shell()).state() == "connecting"


def test_the_table_of_the_machine_names_every_input_that_moves_slots() -> None:
    rows = re.findall(r"^\| ([a-z_/, ()]+?) +\|", machine_module.__doc__ or "", re.MULTILINE)
    named = {word for row in rows for word in re.split(r"[ /,]+", row)}
    assert {*PLACED, "acquire", "abandon", "dial_needed", "dial_failed", "closed", "tick", "resize"} <= named
    assert {
        "release_touched",
        "release_broken",
        "reset_failed",
        "check_failed",
        "refresh",
        "drain",
        "close",
    } <= named


GIVE: dict[str, tuple[str, Callable[..., object]]] = {
    "dial_needed": ("connecting", lambda m, s: m.dial_needed(s, 5000.0)),
    "dialed": ("connecting", lambda m, s: m.dialed(s, 5000.0)),
    "dial_failed": ("connecting", lambda m, s: m.dial_failed(s, 5000.0, "destination")),
    "release": ("leased", lambda m, s: m.release(s, 5000.0)),
    "release_touched": ("leased", lambda m, s: m.release_touched(s, 5000.0)),
    "release_broken": ("leased", lambda m, s: m.release_broken(s, 5000.0, "broken", "destination")),
    "reset_done": ("resetting", lambda m, s: m.reset_done(s, 5000.0)),
    "reset_failed": ("resetting", lambda m, s: m.reset_failed(s, 5000.0, "destination")),
    "check_passed": ("checking", lambda m, s: m.check_passed(s, 5000.0, True)),
    "check_failed": ("checking", lambda m, s: m.check_failed(s, 5000.0, "check_failed", "destination")),
    "closed": ("closing", lambda m, s: m.closed(s, 5000.0)),
}


@pytest.mark.parametrize("name", GIVE)
@pytest.mark.parametrize("state", SCENES)
def test_an_illegal_input_raises_with_both_states_and_changes_nothing(name: str, state: str) -> None:
    wanted, give = GIVE[name]
    if state == wanted:
        return
    shell = Shell()
    slot = SCENES[state](shell)
    m = shell.m

    def picture() -> tuple[object, ...]:
        return (
            shell.states(),
            slot.state(),
            (slot.since, slot.epoch, slot.proved, slot.expires, slot.reason),
            (m.size, m.epoch, m.alarm, m.acquired, m.holds.count(), m.dials.count(), m.growth.failing()),
            (dict(m.opened_by), dict(m.closed_by), dict(m.refused_by)),
        )

    before = picture()
    with pytest.raises(ValueError, match=rf"{state}.*{wanted}"):
        give(m, slot)
    assert picture() == before
    assert m.effects == []
    m.check()


def test_only_a_granted_waiter_can_accept_and_only_once() -> None:
    shell = Shell()
    waiter = shell.wait()
    with pytest.raises(ValueError, match="no lease"):
        shell.m.accept(waiter)
    shell.dial_all()
    slot = shell.m.accept(waiter)
    assert slot.state() == "leased"
    with pytest.raises(ValueError, match="no lease"):
        shell.m.accept(waiter)


# -- order ----------------------------------------------------------------------------------------------------


def test_a_released_connection_goes_to_the_oldest_waiter() -> None:
    shell = Shell(max_size=1)
    slot = leased(shell)
    waiters = [shell.wait() for _ in range(5)]
    for waiter in waiters:
        shell.release(slot)
        assert granted(shell) == [waiter]
        assert shell.m.accept(waiter) is slot


def test_a_newcomer_cannot_take_what_was_released_for_a_waiter() -> None:
    shell = Shell(max_size=1)
    slot = leased(shell)
    first = shell.wait()
    shell.release(slot)
    assert isinstance(shell.acquire(0.0), Waiter)
    second = shell.wait()
    assert (first.slot, second.slot) == (slot, None)


def test_the_connection_used_last_is_lent_first() -> None:
    shell = Shell()
    slots = shell.filled(3)
    assert [shell.lease() for _ in slots] == slots[::-1]


def test_a_borrower_with_settings_gets_equal_ones_then_a_bare_connection_then_the_freshest() -> None:
    shell = Shell()
    bare, old, equal, fresh = shell.filled(4, "x", "a", "y")
    assert [shell.lease("a") for _ in range(4)] == [equal, bare, fresh, old]


def test_among_the_32_oldest_waiters_the_first_with_equal_settings_is_chosen() -> None:
    shell = Shell(max_size=1)
    slot = leased(shell)
    others = [shell.wait() for _ in range(LOOKS - 1)]
    equal = shell.wait(settings="a")
    shell.wait(settings="a")
    shell.release(slot, "a")
    assert granted(shell) == [equal]
    assert [waiter.passed for waiter in others] == [1] * len(others)


def test_a_33rd_waiter_is_not_looked_at_for_his_settings() -> None:
    shell = Shell(max_size=1)
    slot = leased(shell)
    others = [shell.wait() for _ in range(LOOKS)]
    shell.wait(settings="a")
    shell.release(slot, "a")
    assert granted(shell) == others[:1]


def test_a_waiter_is_passed_over_at_most_8_times() -> None:
    shell = Shell(max_size=1)
    slot = leased(shell)
    patient = shell.wait()
    for turn in range(PASSES + 1):
        equal = shell.wait(settings="a")
        shell.release(slot, "a")
        (winner,) = granted(shell)
        assert winner is (equal if turn < PASSES else patient)
        shell.m.accept(winner)


def test_who_found_his_connection_dead_is_the_first_in_line_again() -> None:
    shell = Shell(max_size=2, max_waiting=2)
    dead, alive = shell.filled(2)
    shell.lease(), shell.lease()
    shell.wait(), shell.wait()
    shell.break_lease(dead, "private", "server_closed")
    retried = shell.wait(again=True)
    shell.release(alive)
    assert granted(shell) == [retried]


def test_who_found_his_connection_dead_may_still_retry_while_the_pool_drains_but_not_once_closed() -> None:
    shell = Shell(max_size=1)
    slot = leased(shell)
    shell.m.drain(shell.now, shell.now + 60.0)
    shell.break_lease(slot, "private", "server_closed")
    retried = shell.wait(again=True)
    shell.close_all()
    shell.dial_all()
    assert granted(shell) == [retried]
    shell.m.close(shell.now)
    late = shell.acquire(again=True)
    assert isinstance(late, Waiter)
    assert late.refused == "closed"


def test_a_retry_that_does_not_wait_opens_nothing_for_a_pool_that_drains() -> None:
    shell = Shell(max_size=2)
    slot = leased(shell)
    shell.m.drain(shell.now, shell.now + 60.0)
    shell.break_lease(slot, "private", "server_closed")
    refused = shell.acquire(0.0, again=True)
    assert isinstance(refused, Waiter)
    assert refused.refused == "timeout"
    assert shell.take(OPEN) == []


# -- refusals -------------------------------------------------------------------------------------------------


def test_a_timeout_of_0_takes_what_is_idle_and_never_waits() -> None:
    shell = Shell(max_size=1)
    refused = shell.acquire(0.0)
    assert isinstance(refused, Waiter)
    assert (refused.refused, refused.ring) == ("timeout", None)
    assert shell.take(REFUSE) == [], "he was told by the return value"
    shell.dial_all()
    assert isinstance(shell.acquire(0.0), Slot)


def test_callers_who_do_not_wait_have_one_connection_at_a_time_opened_for_the_next() -> None:
    shell = Shell(max_size=3)
    for _ in range(10):
        shell.acquire(0.0)
    assert len(shell.todo[OPEN]) == 1
    shell.dial_all()
    assert shell.m.opened_by == {"attempt": 1}


def test_one_more_than_max_waiting_is_refused_at_once() -> None:
    shell = Shell(max_size=1, max_waiting=2)
    leased(shell)
    shell.wait(), shell.wait()
    third = shell.acquire()
    assert isinstance(third, Waiter)
    assert third.refused == "queue_full"
    assert shell.m.refused_by == {"queue_full": 1}


def test_with_max_waiting_0_only_an_idle_connection_can_be_had() -> None:
    shell = Shell(max_size=1, max_waiting=0)
    refused = shell.acquire()
    assert isinstance(refused, Waiter)
    assert refused.refused == "queue_full"


def test_each_waiter_is_refused_at_his_own_deadline_and_the_alarm_is_set_to_the_first() -> None:
    shell = Shell(max_size=1)
    leased(shell)
    late, soon = shell.wait(timeout=9.0), shell.wait(timeout=3.0)
    began = shell.now
    assert shell.m.alarm == began + 3.0
    shell.tick(2.999)
    assert shell.take(REFUSE) == []
    shell.tick(0.001)
    assert shell.take(REFUSE) == [soon]
    assert soon.refused == "timeout"
    shell.run(until=began + 9.0)
    assert shell.take(REFUSE) == [late]


def test_a_waiter_without_end_is_never_refused_by_the_clock() -> None:
    shell = Shell(max_size=1)
    leased(shell)
    waiter = shell.wait(timeout=NEVER)
    shell.tick(1e9)
    assert waiter.ring is shell.m.waiting


# -- leaving --------------------------------------------------------------------------------------------------


def test_a_waiter_who_leaves_the_line_is_skipped() -> None:
    shell = Shell(max_size=1)
    slot = leased(shell)
    gone_away, next_one = shell.wait(), shell.wait()
    shell.m.abandon(gone_away, shell.now)
    shell.release(slot)
    assert granted(shell) == [next_one]
    assert shell.m.refused_by == {"abandoned": 1}


def test_a_lease_granted_to_somebody_who_left_goes_to_the_next_in_line() -> None:
    shell = Shell(max_size=1)
    slot = leased(shell)
    gone_away, next_one = shell.wait(), shell.wait()
    shell.release(slot)
    shell.m.abandon(gone_away, shell.now)
    shell.gather()
    assert granted(shell) == [gone_away, next_one]
    assert (gone_away.slot, next_one.slot) == (None, slot)
    shell.m.abandon(next_one, shell.now)
    shell.gather()
    assert slot.state() == "idle"


def test_leaving_twice_or_after_a_refusal_changes_nothing() -> None:
    shell = Shell(max_size=1)
    leased(shell)
    waiter = shell.wait(timeout=1.0)
    shell.tick(1.0)
    shell.m.abandon(waiter, shell.now)
    shell.m.abandon(waiter, shell.now)
    shell.gather()
    assert (waiter.refused, shell.m.refused_by) == ("timeout", {"timeout": 1})


# -- time -----------------------------------------------------------------------------------------------------


def answer_pings(shell: Shell) -> None:
    for slot in shell.take(PING):
        shell.m.check_passed(slot, shell.now, True)
    for slot in shell.take(CLOSE):
        shell.m.closed(slot, shell.now)
    shell.dial_all()


def test_an_idle_connection_is_closed_after_idle_timeout_though_it_is_pinged_meanwhile() -> None:
    shell = Shell(idle_timeout=100.0, check_after=80.0)
    idle(shell)
    shell.run(until=shell.now + 99.0, answer=answer_pings)
    assert shell.m.size == 1
    shell.run(until=shell.now + 1.1, answer=answer_pings)
    assert shell.m.closed_by == {"idle_timeout": 1}


@pytest.mark.parametrize("began", [1000.1, 1.1, 0.3, 7.7])
@pytest.mark.parametrize("idle_timeout", [0.1, 2.2, 0.7, 300.0])
def test_a_tick_exactly_at_the_alarm_finds_the_idle_timeout_over(began: float, idle_timeout: float) -> None:
    shell = Shell(idle_timeout=idle_timeout, check_after=0.0)
    shell.now = began
    over = idle(shell).since + idle_timeout
    while shell.m.alarm <= over:
        shell.now = shell.m.alarm
        shell.tick()
    assert shell.m.closed_by == {"idle_timeout": 1}


def test_idle_timeout_never_undercuts_the_warm_minimum() -> None:
    shell = Shell(min_size=2, max_size=5, idle_timeout=10.0)
    shell.filled(5)
    shell.run(until=shell.now + 1000.0, answer=answer_pings)
    assert shell.m.shelf.size() == 2
    assert shell.m.closed_by == {"idle_timeout": 3}


def test_a_dial_under_way_does_not_count_as_a_warm_connection() -> None:
    shell = Shell(min_size=1, max_size=5, idle_timeout=10.0)
    slot = leased(shell)
    shell.todo[OPEN].clear()
    waiter = shell.wait()
    shell.run(until=shell.now + 5.0)
    (pending,) = shell.take(OPEN)
    assert shell.m.dial_needed(pending, shell.now)
    shell.release(slot)
    shell.release(shell.m.accept(waiter))
    shell.run(until=shell.now + 15.0)
    assert slot.state() == "idle", "closed though the dial may yet fail"


def test_the_longest_idle_goes_first() -> None:
    shell = Shell(min_size=1, max_size=3, idle_timeout=10.0)
    first, second, third = shell.filled(3)
    shell.release(shell.lease())
    shell.run(until=shell.now + 15.0)
    assert shell.take(CLOSE) == [first, second]
    assert third.state() == "idle"


def test_the_share_of_jitter_in_its_lifetime_is_drawn_once_for_each_connection() -> None:
    drawn = iter([0.0, 0.5, 1.0])
    shell = Shell(max_lifetime=1000.0, random=lambda: next(drawn))
    born = shell.now
    slots = shell.filled(3)
    assert [slot.expires - born for slot in slots] == pytest.approx([1000.0, 950.0, 900.0])
    for _ in range(10):
        shell.release(shell.lease())
        shell.tick(1.0)
    assert next(drawn, None) is None
    assert [slot.expires - born for slot in slots] == pytest.approx([1000.0, 950.0, 900.0])


def test_a_connection_too_old_is_replaced_when_idle_and_not_taken_from_its_borrower() -> None:
    shell = Shell(min_size=2, max_size=2, max_lifetime=100.0, check_after=0.0)
    shell.filled(2)
    slot = shell.lease()
    shell.run(until=shell.now + 100.0, answer=answer_pings)
    assert slot.state() == "leased"
    assert shell.m.closed_by == {"max_lifetime": 1}
    shell.release(slot)
    answer_pings(shell)
    assert shell.m.closed_by == {"max_lifetime": 2}
    assert shell.m.shelf.size() == 2


def test_a_connection_past_its_life_is_not_lent_though_no_tick_came() -> None:
    shell = Shell(max_size=2)
    old, fresh = shell.filled(2)
    shell.now = fresh.expires
    got = shell.wait()
    assert (old.state(), fresh.state(), got.slot) == ("closing", "closing", None)


def test_checks_of_connections_that_became_idle_together_spread_over_a_quarter_of_check_after() -> None:
    shares = iter([i / 10 for i in range(10)])
    shell = Shell(max_size=10, check_after=40.0, random=lambda: next(shares))
    shell.filled(10)
    began, times = shell.now, []

    def note(shell: Shell) -> None:
        times.extend([shell.now - began] * len(shell.todo[PING]))
        answer_pings(shell)

    shell.run(until=began + 40.0, answer=note)
    assert sorted(times)[:10] == pytest.approx([40.0 - i for i in range(9, -1, -1)], abs=0.02)


def test_a_connection_in_use_is_not_pinged_and_one_just_used_not_yet() -> None:
    shell = Shell(check_after=30.0)
    idle(shell)
    for _ in range(10):
        shell.run(until=shell.now + 20.0)
        shell.release(shell.lease())
    assert shell.take(PING) == []
    shell.run(until=shell.now + 30.0)
    assert len(shell.take(PING)) == 1


def test_with_check_after_0_nothing_is_pinged_off_the_path() -> None:
    shell = Shell(min_size=1, check_after=0.0, max_lifetime=1e9)
    idle(shell)
    shell.run(until=shell.now + 10_000.0)
    assert shell.take(PING) == []


def test_a_tick_at_any_other_time_is_harmless() -> None:
    shell = Shell(min_size=1)
    idle(shell)
    before = shell.states()
    for _ in range(100):
        shell.tick(0.01)
    assert shell.states() == before
    assert shell.m.alarm > shell.now


# -- failures -------------------------------------------------------------------------------------------------


def test_a_single_broken_connection_only_makes_the_machine_peek_at_the_idle_ones() -> None:
    shell = Shell(max_size=5)
    *others, slot = shell.filled(5)
    assert shell.lease() is slot
    shell.break_lease(slot, "connection")
    assert shell.take(PEEK) == others
    assert shell.m.epoch == 0
    for other in others:
        shell.m.check_passed(other, shell.now, False)
    assert shell.m.shelf.slots() == others


def test_two_broken_connections_within_a_second_make_every_older_idle_one_stale() -> None:
    shell = Shell(max_size=5)
    shell.filled(5)
    first, second = shell.lease(), shell.lease()
    shell.break_lease(first, "connection")
    for slot in shell.take(PEEK):
        shell.m.check_passed(slot, shell.now, False)
    shell.now += 1.0
    shell.break_lease(second, "connection")
    assert shell.m.closed_by == {"broken": 2, "stale": 3}
    assert shell.take(PEEK) == []


def test_two_broken_connections_more_than_a_second_apart_are_two_single_ones() -> None:
    shell = Shell(max_size=5)
    shell.filled(5)
    first, second = shell.lease(), shell.lease()
    shell.break_lease(first, "connection")
    shell.now += 1.001
    shell.break_lease(second, "connection")
    assert (shell.m.epoch, shell.m.closed_by) == (0, {"broken": 2})


def test_a_failure_before_the_flush_does_not_count_against_connections_opened_since() -> None:
    shell = Shell(max_size=3)
    shell.filled(3)
    shell.break_lease(shell.lease(), "connection")
    for slot in shell.take(PEEK):
        shell.m.check_passed(slot, shell.now, False)
    shell.break_lease(shell.lease(), "destination")
    shell.close_all()
    fresh = shell.filled(2)
    shell.break_lease(shell.lease(), "connection")
    assert (shell.m.epoch, fresh[0].state()) == (1, "checking")


def test_a_peek_proves_less_than_a_ping_and_does_not_put_off_the_next_check() -> None:
    shell = Shell(max_size=2, check_after=30.0)
    other, _ = shell.filled(2)
    began = other.since
    shell.run(until=began + 20.0)
    shell.break_lease(shell.lease(), "connection")
    assert shell.take(PEEK) == [other]
    shell.m.check_passed(other, shell.now, False)
    shell.run(until=began + 30.0)
    assert shell.take(PING) == [other]
    shell.m.check_passed(other, shell.now, True)
    shell.run(until=began + 59.0)
    assert shell.take(PING) == []


@pytest.mark.parametrize("failure", ["private", "temporary", "permanent"])
def test_a_failure_of_its_own_says_nothing_of_the_others(failure: str) -> None:
    shell = Shell(max_size=3)
    shell.filled(3)
    for _ in range(2):
        shell.break_lease(shell.lease(), failure)
    assert (shell.m.epoch, shell.m.shelf.size(), shell.take(PEEK)) == (0, 1, [])


def test_after_a_restart_20_idle_connections_go_without_a_probe_and_one_dial_asks_first() -> None:
    shell = Shell(min_size=0, max_size=20)
    shell.filled(20)
    slot = shell.lease()
    shell.break_lease(slot, "destination")
    assert shell.m.closed_by == {"broken": 1, "stale": 19}
    assert shell.take(PEEK) == shell.take(PING) == []
    waiters = [shell.wait() for _ in range(10)]
    shell.close_all()
    (probe,) = shell.take(OPEN)
    shell.dial(probe, took=0.01)
    assert shell.m.opened_by["probe"] == 1
    shell.tick(1.0)
    assert shell.m.connecting.size > 1, "it is back: the gate is open again"
    shell.dial_all()
    served: list[Waiter] = []
    while fresh := granted(shell):
        served += fresh
        for waiter in fresh:
            shell.release(shell.m.accept(waiter))
    assert served == waiters


def test_connections_on_loan_during_a_failure_are_closed_when_they_come_back() -> None:
    shell = Shell(max_size=2)
    shell.filled(2)
    first, second = shell.lease(), shell.lease()
    shell.break_lease(first, "destination")
    shell.release(second)
    assert second.reason == "stale"


def test_old_news_of_a_failure_does_not_harm_connections_opened_since() -> None:
    shell = Shell(max_size=3)
    shell.filled(3)
    leases = [shell.lease() for _ in range(3)]
    shell.break_lease(leases[0], "destination")
    shell.close_all()
    shell.wait()
    shell.dial_all()
    fresh = shell.m.accept(granted(shell)[0])
    shell.release(fresh)
    for slot in leases[1:]:
        shell.break_lease(slot, "destination")
    assert (fresh.state(), shell.m.epoch) == ("idle", 1)


def test_a_connection_dialed_after_a_failure_is_fresh_though_it_was_ordered_before() -> None:
    shell = Shell(max_size=2)
    slot = connecting(shell)
    shell.m.refresh(shell.now)
    shell.dial(slot)
    assert slot.state() == "leased"


def test_a_dial_that_began_before_a_failure_and_ended_after_it_is_stale() -> None:
    shell = Shell(max_size=2)
    slot = dialing(shell)
    shell.m.refresh(shell.now)
    shell.m.dialed(slot, shell.now)
    assert slot.reason == "stale"


def test_a_destination_that_cannot_be_dialed_makes_idle_connections_stale() -> None:
    shell = Shell(max_size=3)
    other, slot = shell.filled(2)
    assert shell.lease() is slot
    shell.lease()
    shell.wait()
    shell.run(until=shell.now + 1.0)
    (pending,) = shell.take(OPEN)
    assert shell.m.dial_needed(pending, shell.now)
    shell.release(slot)
    shell.release(other)
    assert shell.m.shelf.slots() == [other]
    shell.m.dial_failed(pending, shell.now, "destination")
    assert (other.state(), other.reason) == ("closing", "stale")


def test_a_permanent_refusal_of_the_server_refuses_waiters_when_nothing_is_alive() -> None:
    shell = Shell(max_size=2)
    waiters = [shell.wait() for _ in range(5)]
    first, second = shell.take(OPEN)
    shell.fail_dial(first, "permanent")
    assert shell.take(REFUSE) == [], "the other dial may work"
    shell.fail_dial(second, "permanent")
    assert shell.take(REFUSE) == waiters
    assert {waiter.refused for waiter in waiters} == {"connect_failed"}


def test_a_permanent_refusal_refuses_nobody_while_a_connection_is_alive() -> None:
    shell = Shell(max_size=2)
    slot = leased(shell)
    waiter = shell.wait()
    shell.run(until=shell.now + 1.0)
    shell.fail_dial(shell.take(OPEN)[0], "permanent")
    assert not waiter.refused
    shell.release(slot)
    assert waiter.slot is slot


# -- operators ------------------------------------------------------------------------------------------------


def test_draining_refuses_newcomers_serves_the_line_until_the_deadline_and_closes_what_is_idle() -> None:
    shell = Shell(min_size=2, max_size=2)
    shell.filled(2)
    first, second = shell.lease(), shell.lease()
    served, unlucky = shell.wait(timeout=100.0), shell.wait(timeout=100.0)
    shell.m.drain(shell.now, shell.now + 10.0)
    newcomer = shell.acquire()
    assert isinstance(newcomer, Waiter)
    assert newcomer.refused == "draining"
    shell.release(first)
    assert served.slot is first
    shell.run(until=shell.now + 10.0)
    assert unlucky.refused == "draining"
    shell.release(second)
    shell.release(shell.m.accept(served))
    shell.close_all()
    assert shell.m.size == 0


def test_resume_ends_a_drain_and_opens_the_minimum_again() -> None:
    shell = Shell(min_size=2, max_size=2)
    shell.filled(2)
    shell.m.drain(shell.now, shell.now + 10.0)
    shell.gather()
    shell.close_all()
    shell.m.resume(shell.now)
    shell.gather()
    assert shell.dial_all() == 2
    assert isinstance(shell.acquire(0.0), Slot)


def test_the_deadline_of_a_drain_does_not_outlive_it() -> None:
    shell = Shell(max_size=1)
    leased(shell)
    shell.m.drain(shell.now, shell.now + 10.0)
    shell.m.resume(shell.now)
    waiter = shell.wait(timeout=60.0)
    shell.run(until=shell.now + 20.0)
    assert waiter.ring is shell.m.waiting


def test_a_closed_pool_cannot_be_resumed_drained_or_made_to_grow() -> None:
    shell = Shell(min_size=2, max_size=4)
    shell.filled(2)
    shell.m.close(shell.now)
    shell.gather()
    shell.close_all()
    for call in (
        lambda: shell.m.resume(shell.now),
        lambda: shell.m.drain(shell.now, shell.now),
        lambda: shell.m.resize(shell.now, 3, 9),
        lambda: shell.m.refresh(shell.now),
        lambda: shell.m.start(shell.now),
        lambda: shell.m.close(shell.now),
        lambda: shell.m.tick(shell.now + 100.0),
    ):
        call()
        shell.gather()
        assert (shell.m.mode, shell.m.size, shell.take(OPEN)) == ("closed", 0, [])


def test_closing_refuses_everybody_in_line_and_closes_leases_as_they_come_back() -> None:
    shell = Shell(max_size=1)
    slot = leased(shell)
    waiters = [shell.wait() for _ in range(3)]
    shell.m.close(shell.now)
    shell.gather()
    assert shell.take(REFUSE) == waiters
    assert {waiter.refused for waiter in waiters} == {"closed"}
    shell.release(slot)
    assert slot.reason == "pool_closed"


def test_a_lowered_limit_closes_idle_connections_at_once_the_oldest_first_and_leases_as_they_return() -> None:
    shell = Shell(max_size=5)
    slots = shell.filled(5)
    leases = [shell.lease() for _ in range(3)]
    shell.m.resize(shell.now, 0, 2)
    shell.gather()
    assert shell.take(CLOSE) == slots[:2]
    for slot in leases:
        shell.release(slot)
    assert shell.m.closed_by == {"surplus": 3}
    assert shell.m.shelf.size() == 2


def test_a_raised_limit_serves_the_line_at_once() -> None:
    shell = Shell(max_size=1)
    leased(shell)
    waiter = shell.wait()
    shell.run(until=shell.now + 1.0)
    shell.m.resize(shell.now, 0, 2)
    shell.gather()
    shell.dial_all()
    assert waiter.slot is not None


def test_a_dying_connection_counts_against_the_limit_until_the_server_has_let_go() -> None:
    shell = Shell(max_size=1)
    slot = leased(shell)
    shell.wait()
    shell.break_lease(slot, "private")
    shell.run(until=shell.now + 5.0)
    assert shell.take(OPEN) == []
    shell.m.closed(slot, shell.now)
    shell.gather()
    assert len(shell.take(OPEN)) == 1


def test_a_refreshed_pool_replaces_every_connection_and_keeps_its_minimum() -> None:
    shell = Shell(min_size=2, max_size=2)
    shell.filled(2)
    slot = shell.lease()
    shell.m.refresh(shell.now)
    shell.gather()
    shell.close_all()
    shell.release(slot)
    shell.close_all()
    shell.dial_all()
    assert shell.m.closed_by == {"stale": 2}
    assert shell.m.shelf.size() == 2


# -- many -----------------------------------------------------------------------------------------------------


def test_100_000_waiters_are_served_in_order_by_one_connection() -> None:
    shell = Shell(max_size=1, max_waiting=100_000)
    slot = leased(shell)
    m, now = shell.m, shell.now
    waiters = [m.acquire(now, 30.0) for _ in range(100_000)]
    assert m.waiting.size == 100_000
    for waiter in waiters:
        m.release(slot, now)
        assert m.accept(waiter) is slot
    assert [whom for what, whom in m.effects if what == GRANT] == waiters
    assert len([what for what, _ in m.effects if what == OPEN]) == 0
    m.check()


def test_100_000_waiters_time_out_in_one_tick() -> None:
    shell = Shell(max_size=1, max_waiting=100_000)
    leased(shell)
    waiters = [shell.m.acquire(shell.now, 30.0) for _ in range(100_000)]
    shell.tick(30.0)
    assert shell.take(REFUSE) == waiters
    assert len(shell.m.agenda.heap) == 0


def test_100_000_waiters_served_early_leave_little_behind_though_no_tick_comes() -> None:
    shell = Shell(max_size=1)
    slot = leased(shell)
    m, most = shell.m, 0
    for _ in range(100_000):
        waiter = m.acquire(shell.now, 3600.0)
        m.release(slot, shell.now)
        m.accept(waiter)
        m.effects.clear()
        most = max(most, len(m.agenda.heap))
    assert most < 200


def test_100_000_waiters_who_leave_again_leave_little_behind() -> None:
    shell = Shell(max_size=1)
    leased(shell)
    m = shell.m
    for _ in range(100_000):
        m.abandon(m.acquire(shell.now, 3600.0), shell.now)
    assert len(m.agenda.heap) < 200


def test_connections_that_come_and_go_leave_little_behind() -> None:
    shell = Shell(max_size=1, check_after=0.0, max_lifetime=1e9, idle_timeout=1e9)
    m, most = shell.m, 0
    for _ in range(2000):
        shell.wait()
        shell.dial_all()
        shell.release(m.accept(granted(shell)[0]))
        shell.break_lease(shell.lease(), "private")
        shell.close_all()
        most = max(most, len(m.agenda.heap))
    assert most < 200
