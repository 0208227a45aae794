"""A pool's figures at one moment: the core has them, since the proxy shows the same; a pool's users look here."""

from cenote.core.stats import Distribution, PoolStats, as_dict, snapshot

__all__ = ["Distribution", "PoolStats", "as_dict", "snapshot"]
