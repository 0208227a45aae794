"""The shelf: idle slots by age and by the settings they carry."""

import pytest

from cenote.core.shelf import Shelf
from cenote.core.slot import Slot


def slot(since: float, settings: object = None) -> Slot:
    made = Slot("demand", 0, since)
    made.settings = settings
    return made


def shelf_of(*slots: Slot) -> Shelf:
    shelf = Shelf()
    for one in slots:
        shelf.put(one)
    return shelf


def test_an_empty_shelf_has_nothing_to_offer() -> None:
    shelf = Shelf()
    assert shelf.best(None) is None
    assert shelf.best("a") is None
    assert shelf.oldest() is None
    assert (shelf.size(), shelf.slots()) == (0, [])


def test_the_slot_used_last_is_lent_first() -> None:
    old, new = slot(1), slot(2)
    shelf = shelf_of(old, new)
    assert shelf.best(None) is new
    shelf.remove(new)
    assert shelf.best(None) is old


def test_equal_settings_are_preferred_to_a_fresher_slot() -> None:
    equal, bare, other = slot(1, "a"), slot(2), slot(3, "b")
    assert shelf_of(equal, bare, other).best("a") is equal


def test_without_equal_settings_a_bare_slot_is_preferred_to_a_fresher_one() -> None:
    bare, other = slot(1), slot(2, "b")
    shelf = shelf_of(bare, other)
    assert shelf.best("a") is bare
    assert shelf.best(None) is bare


def test_with_neither_the_freshest_slot_of_all_is_taken() -> None:
    slots = [slot(1, "a"), slot(4, "b"), slot(3, "c")]
    shelf = shelf_of(*slots)
    assert shelf.best("x") is slots[1]
    assert shelf.best(None) is slots[1]


def test_the_oldest_is_the_one_idle_for_longest_whatever_it_carries() -> None:
    slots = [slot(2), slot(1, "a"), slot(3, "b")]
    assert shelf_of(*slots).oldest() is slots[1]


def test_a_slot_that_was_only_looked_at_gets_its_old_place_back() -> None:
    first, second, third = slot(1), slot(2), slot(3)
    shelf = shelf_of(first, second, third)
    for looked_at in (first, second, third):
        shelf.remove(looked_at)
        shelf.put(looked_at)
        assert shelf.slots() == [first, second, third]


def test_settings_that_nobody_carries_any_more_cost_no_memory() -> None:
    shelf = Shelf()
    for number in range(1000):
        one = slot(number, f"setting {number}")
        shelf.put(one)
        shelf.remove(one)
    assert len(shelf.rings) == 1


def test_taking_what_is_not_idle_raises_and_says_what_it_is() -> None:
    stranger = slot(1)
    shelf = Shelf()
    with pytest.raises(ValueError, match=r"gone.*not idle"):
        shelf.remove(stranger)
    shelf.put(stranger)
    with pytest.raises(ValueError, match="idle"):
        shelf.put(stranger)
    assert shelf.size() == 1
