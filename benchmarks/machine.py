"""What the figures were measured on: printed above every result, kept in its JSON.

It only looks. A figure without its machine means nothing, and neither does one from a busy machine.
"""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import cenote
from cenote import _build

PACKAGES = ("cenote", "psycopg", "psycopg-pool", "asyncpg", "psycopg2-binary", "SQLAlchemy")


def describe(server_version: str) -> dict[str, str]:
    """The machine, the interpreter, the packages, and how Cenote was built."""
    one, five, fifteen = os.getloadavg()
    return {
        "machine": f"{platform.machine()}, {_cpu()}",
        "CPUs": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}",
        "system": f"{platform.system()} {platform.release()}",
        "load average": f"{one:.2f} {five:.2f} {fifteen:.2f} (before the run)",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "PostgreSQL": f"{server_version}, on loopback, without fsync",
        "packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        "Cenote is": "compiled"
        if _build.is_compiled()
        else "NOT compiled: plain Python (the bounds are for the compiled one)",
        "Cenote from": str(Path(str(cenote.__file__)).parent),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"
