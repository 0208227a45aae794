"""The agenda: what is due when, with entries that die lazily and are swept."""

from hypothesis import given
from hypothesis import strategies as st

from cenote.core.agenda import Agenda
from cenote.core.ring import Node, Ring
from cenote.core.slot import NEVER, Slot, Waiter


def waiter(deadline: float) -> Waiter:
    return Waiter(0.0, deadline, None, None)


@given(st.lists(st.floats(0, 10), max_size=30), st.floats(0, 10))
def test_what_is_due_comes_out_in_order_of_time_and_then_of_entry(times: list[float], now: float) -> None:
    agenda = Agenda()
    entries = [(when, waiter(when)) for when in times]
    for when, node in entries:
        agenda.add(when, node)
    out: list[Node] = []
    while (node := agenda.pop_due(now)) is not None:
        out.append(node)
    due = [entry for entry in entries if entry[0] <= now]
    assert out == [node for _, node in sorted(due, key=lambda entry: entry[0])]
    assert agenda.first() == min((when for when in times if when > now), default=NEVER)


def test_a_slot_knows_whether_it_has_an_entry() -> None:
    agenda, slot = Agenda(), Slot("demand", 0, 0.0)
    agenda.add(5.0, slot)
    assert slot.timed
    assert agenda.pop_due(4.9) is None
    assert slot.timed
    assert agenda.pop_due(5.0) is slot
    assert not slot.timed


def test_dead_entries_are_swept_once_they_are_the_majority_and_live_ones_stay() -> None:
    agenda, line, idle = Agenda(), Ring("waiting"), Ring("idle")
    here = [waiter(1000.0 + i) for i in range(50)]
    slot, closed = Slot("demand", 0, 0.0), Slot("demand", 0, 0.0)
    for node in here:
        line.append(node)
        agenda.add(node.deadline, node)
    idle.append(slot)
    agenda.add(7.0, slot)
    agenda.add(6.0, closed)
    most = 0
    for i in range(100_000):
        agenda.add(50_000.0 + i, waiter(50_000.0 + i))
        agenda.sweep(51)
        most = max(most, len(agenda.heap))
    assert most < 2 * 51 + 100
    left = []
    while (node := agenda.pop_due(2000.0)) is not None:
        left.append(node)
    assert left == [slot, *here]
