"""Compile the hot modules where a C compiler is there.

A hot module is a `.py` with a `.pxd` of the same name beside it: the `.py` is the only source, the
`.pxd` adds C types. `CENOTE_COMPILE` decides: `auto` (default: try, fall back to plain Python),
`require` (fail without a compiler), `off`.
"""

import os
from pathlib import Path

from setuptools import Extension, setup

SOURCE = Path("src")
CALLS = SOURCE / "cenote" / "proxy" / "syscalls.pxd"  # stands for its module: functions in C


def hot_modules() -> list[Extension]:
    mode = os.environ.get("CENOTE_COMPILE", "auto")
    if mode not in ("auto", "require", "off"):
        raise SystemExit(f"CENOTE_COMPILE={mode!r}: use auto, require or off")
    if mode == "off":
        return []
    from Cython.Build import cythonize

    modules = [
        Extension(
            ".".join(pxd.with_suffix("").relative_to(SOURCE).parts),
            [str(pxd.with_suffix(".py"))],
            optional=mode == "auto",
            extra_compile_args=["-O2", "-g0"],
        )
        for pxd in sorted(SOURCE.rglob("*.pxd"))
        if pxd != CALLS
    ]
    return list(
        cythonize(
            modules,
            build_dir="build/cython",
            compiler_directives={
                "language_level": 3,
                "annotation_typing": False,
                "binding": True,
                "embedsignature": False,
            },
        )
    )


setup(ext_modules=hot_modules())
