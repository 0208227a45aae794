"""CoDel for a queue of borrowers: refuse early when the queue does not drain, never when it only bursts.

Over each interval the shortest wait is kept. When even that was above the target, the queue is standing
rather than bursting, and whoever has waited for more than twice the target is better refused: serving him
late helps nobody and delays the rest. (Nichols and Jacobson, "Controlling Queue Delay", ACM Queue 2012;
the rule "twice the target" as used by server queues at Facebook and in Elixir's DBConnection.)
Pure: the time is an argument. It judges; the machine refuses.
"""

TARGET_S = 0.05
INTERVAL_S = 2.0


class Codel:
    """The judge of one queue."""

    def __init__(self) -> None:
        self.shortest_s = 0.0
        self.ends = 0.0
        self.standing = False

    def judge(self, wait_s: float, now: float) -> bool:
        """Note that somebody at the head has waited `wait_s`; True if he should be refused. O(1)."""
        if now >= self.ends:
            # A window that nobody looked into says nothing: an old verdict must not outlive its queue.
            self.standing = self.shortest_s > TARGET_S and now < self.ends + INTERVAL_S
            self.shortest_s = wait_s
            self.ends = now + INTERVAL_S
        elif wait_s < self.shortest_s:
            self.shortest_s = wait_s
        return bool(self.standing and wait_s > 2 * TARGET_S)
