"""A doubly linked list whose links live in its members: where a member is, is its state.

A `Node` is in one `Ring` at most and knows which. Adding, removing from anywhere and taking either end
cost O(1) and allocate nothing, which a dict or deque cannot all do (a dict whose first items are deleted
one by one becomes quadratic to read from the front). Refuses to hold a node twice.
"""

from collections.abc import Iterator
from typing import Any


class Node:
    """Something that can be in one ring."""

    def __init__(self) -> None:
        self.ring: Ring | None = None
        self.before: Any = None
        self.after: Any = None


class Ring:
    """An ordered collection of nodes, oldest first. `name` is the state that being in it means."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.size = 0
        self.first: Any = None
        self.last: Any = None

    def append(self, node: Node) -> None:
        """Add as the newest. O(1)."""
        if node.ring is not None:
            raise ValueError(f"node is in {node.ring.name} already")
        node.ring = self
        node.before = self.last
        if self.last is None:
            self.first = node
        else:
            self.last.after = node
        self.last = node
        self.size += 1

    def appendleft(self, node: Node) -> None:
        """Add as the oldest. O(1)."""
        if node.ring is not None:
            raise ValueError(f"node is in {node.ring.name} already")
        node.ring = self
        node.after = self.first
        if self.first is None:
            self.last = node
        else:
            self.first.before = node
        self.first = node
        self.size += 1

    def insert_after(self, node: Node, older: Node) -> None:
        """Add right behind `older`. O(1)."""
        if older.ring is not self:
            raise ValueError(f"node is not in {self.name}")
        if older.after is None:
            self.append(node)
            return
        if node.ring is not None:
            raise ValueError(f"node is in {node.ring.name} already")
        node.ring = self
        node.before = older
        node.after = older.after
        node.after.before = node
        older.after = node
        self.size += 1

    def remove(self, node: Node) -> None:
        """Take out, wherever it stands. O(1)."""
        if node.ring is not self:
            where = "gone" if node.ring is None else node.ring.name
            raise ValueError(f"illegal move: the node is {where}, not {self.name}")
        before = node.before
        after = node.after
        if before is None:
            self.first = after
        else:
            before.after = after
        if after is None:
            self.last = before
        else:
            after.before = before
        # A node that kept its neighbours would keep a chain of dead ones alive.
        node.before = None
        node.after = None
        node.ring = None
        self.size -= 1

    def __len__(self) -> int:
        return int(self.size)

    def __iter__(self) -> Iterator[Any]:
        """Oldest first, as it is now: members may be moved while iterating."""
        nodes = []
        node = self.first
        while node is not None:
            nodes.append(node)
            node = node.after
        return iter(nodes)
