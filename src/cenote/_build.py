"""Which build of the core is running: C made from the modules, or the modules themselves.

It only looks; the decision was taken when the package was built.
"""

from cenote.core import machine


def is_compiled() -> bool:
    """Tell whether the core runs as a C extension (True) or as plain Python."""
    return not str(machine.__file__).endswith((".py", ".pyc"))
