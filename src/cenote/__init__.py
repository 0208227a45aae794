"""Cenote: a connection pool for PostgreSQL, in the process and as a daemon, on one core."""

from cenote._version import __version__
from cenote.errors import (
    AcquireRefused,
    AcquireTimeout,
    CenoteError,
    CenoteWarning,
    ConfigError,
    ConnectFailed,
    LeakWarning,
    LeasesOutstanding,
    MissingDependency,
    MisuseError,
    NestedAcquireDeadlock,
    NestedAcquireWarning,
    NotLeased,
    NotReady,
    PoolClosed,
    PoolDraining,
    QueueFull,
    Shed,
    WrongEventLoop,
)
from cenote.pool.aio import AsyncPool
from cenote.pool.base import Event
from cenote.pool.holders import Holder
from cenote.pool.stats import PoolStats
from cenote.pool.sync import Pool

__all__ = [
    "AcquireRefused",
    "AcquireTimeout",
    "AsyncPool",
    "CenoteError",
    "CenoteWarning",
    "ConfigError",
    "ConnectFailed",
    "Event",
    "Holder",
    "LeakWarning",
    "LeasesOutstanding",
    "MissingDependency",
    "MisuseError",
    "NestedAcquireDeadlock",
    "NestedAcquireWarning",
    "NotLeased",
    "NotReady",
    "Pool",
    "PoolClosed",
    "PoolDraining",
    "PoolStats",
    "QueueFull",
    "Shed",
    "WrongEventLoop",
    "__version__",
]
