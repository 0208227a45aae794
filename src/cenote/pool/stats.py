"""A pool's figures at one moment. They are the machine's, so the core has them; this is where a pool's user looks."""

from cenote.core.stats import Distribution, PoolStats, as_dict, snapshot

__all__ = ["Distribution", "PoolStats", "as_dict", "snapshot"]
