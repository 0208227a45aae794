"""The ring: a linked list whose members know where they are."""

import pytest

from cenote.core.ring import Node, Ring


def nodes(number: int) -> list[Node]:
    return [Node() for _ in range(number)]


def reversed_members(ring: Ring) -> list[Node]:
    found, node = [], ring.last
    while node is not None:
        found.append(node)
        node = node.before
    return found


def test_members_are_listed_oldest_first_whichever_end_they_came_in_by() -> None:
    ring, (a, b, c, d) = Ring("x"), nodes(4)
    ring.append(b)
    ring.append(d)
    ring.appendleft(a)
    ring.insert_after(c, b)
    assert list(ring) == [a, b, c, d]
    assert reversed_members(ring) == [d, c, b, a]
    assert len(ring) == ring.size == 4


def test_inserting_after_the_newest_makes_a_new_newest() -> None:
    ring, (a, b) = Ring("x"), nodes(2)
    ring.append(a)
    ring.insert_after(b, a)
    assert ring.last is b
    assert list(ring) == [a, b]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_members_leave_from_anywhere_and_the_rest_stays_linked(order: tuple[int, ...]) -> None:
    ring, members = Ring("x"), nodes(3)
    for node in members:
        ring.append(node)
    left = list(members)
    for index in order:
        ring.remove(members[index])
        left.remove(members[index])
        assert list(ring) == left
        assert reversed_members(ring) == left[::-1]
    assert ring.first is ring.last is None


def test_a_node_that_has_left_keeps_no_neighbours_alive() -> None:
    ring, (a, b, c) = Ring("x"), nodes(3)
    for node in (a, b, c):
        ring.append(node)
    ring.remove(b)
    assert (b.ring, b.before, b.after) == (None, None, None)


def test_a_node_is_in_one_ring_at_most() -> None:
    one, two, (a, b) = Ring("one"), Ring("two"), nodes(2)
    one.append(a)
    two.append(b)
    for add in (two.append, two.appendleft, lambda node: two.insert_after(node, b), one.append):
        with pytest.raises(ValueError, match="one"):
            add(a)
    assert (list(one), list(two)) == ([a], [b])


def test_taking_a_node_out_of_a_ring_it_is_not_in_names_both_places() -> None:
    one, two, (a, b) = Ring("one"), Ring("two"), nodes(2)
    one.append(a)
    with pytest.raises(ValueError, match=r"one\b.*\btwo"):
        two.remove(a)
    with pytest.raises(ValueError, match=r"gone\b.*\btwo"):
        two.remove(b)
    with pytest.raises(ValueError, match="two"):
        two.insert_after(b, a)
    assert (list(one), list(two)) == ([a], [])


def test_members_may_be_moved_while_iterating() -> None:
    ring, other, members = Ring("x"), Ring("y"), nodes(5)
    for node in members:
        ring.append(node)
    for node in ring:
        ring.remove(node)
        other.append(node)
    assert list(other) == members
    assert not ring.size
