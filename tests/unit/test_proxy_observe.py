"""A dry run's account: how many connections were needed, and for how long."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cenote.proxy import observe


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(observe, "monotonic", clock)
    return clock


@pytest.fixture
def watch(clock: Clock) -> observe.Watch:
    return observe.Watch(SimpleNamespace(note=lambda what, text: None, refuses_pins=False, pin_reason=str))


def entered(watch: observe.Watch) -> Any:
    client = SimpleNamespace(settings=None, sight=None)
    watch.enters(client)
    return client


def test_what_was_enough_is_told_by_the_time_in_which_any_was_needed(watch: observe.Watch, clock: Clock) -> None:
    one, two, three = (entered(watch) for _ in range(3))
    assert watch.needed_for(0.99) == 0
    clock.now += 1000.0  # nobody needs one: that does not count
    one.sight.is_now(True, False)
    clock.now += 90.0
    two.sight.is_now(True, False)
    clock.now += 9.5
    three.sight.is_now(False, True)
    clock.now += 0.5
    assert [watch.needed_for(share) for share in (0.5, 0.9, 0.95, 0.99, 0.999)] == [1, 1, 2, 2, 3]
    for client in (one, two, three):
        watch.leaves(client)
    clock.now += 1000.0
    assert watch.needed_for(0.99) == 2
    assert watch.peaks["needed"] == 3
    assert not any(watch.now.values())


def test_a_client_that_is_busy_and_pinned_needs_one_connection(watch: observe.Watch) -> None:
    client = entered(watch)
    client.sight.is_now(True, False)
    client.sight.is_now(True, True)
    assert watch.now == {"clients": 1, "connections": 0, "busy": 1, "pinned": 1, "listening": 0, "needed": 1}
    client.sight.rests()
    assert watch.now == {"clients": 1, "connections": 0, "busy": 0, "pinned": 1, "listening": 0, "needed": 1}
