"""The import rule: which room may use which, read from the source and proven in a fresh interpreter."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The sources, also when the package under test is an installed, compiled one.
SOURCE = Path(__file__).parents[2] / "src" / "cenote"
MODULES = {
    ".".join(("cenote", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}
WORDS = {"errors", "reasons", "config"}
PUBLIC = "cenote"  # the package itself: its public names
TOPS = {"measure", "watch", "cli", "embedded"}
# Room: the rooms it may import, beside itself and the words.
ALLOWED: dict[str, set[str]] = {
    **dict.fromkeys(WORDS, WORDS),
    "_version": set(),
    "_build": {"core", "_version"},
    "core": set(),
    "sql": set(),
    "wire": set(),
    "pool": {"core", "sql"},
    "http": {"core", "sql"},
    "proxy": {"core", "sql", "wire"},
    "watch": {"core", "sql", "pool", "http", "proxy", PUBLIC, "_version", "_build"},
    "embedded": {"core", "sql", PUBLIC, "_version", "_build"},
    "measure": {*TOPS, "core", "sql", "wire", "pool", "http", "proxy", "testing", PUBLIC, "_version", "_build"},
    "cli": {*TOPS, "core", "sql", "wire", "pool", "http", "proxy", PUBLIC, "_version", "_build"},
    "testing": {"core", "sql", "wire", "pool", "http", "proxy", "embedded", PUBLIC, "_version", "_build"},
    PUBLIC: {"core", "pool", "http", "_version", "_build"},
}
# A pool that reads the clock, a socket or a random number inside its machine cannot be tested or simulated.
TOOLS_OF_THE_CORE = {"__future__", "collections.abc", "dataclasses", "enum", "heapq", "math", "typing"}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else PUBLIC


def imports(module: str) -> list[tuple[int, str]]:
    """Every module that this one imports, anywhere in it, as `(line, absolute name)`."""
    path = MODULES[module]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.append((node.lineno, inner if inner in MODULES else base))
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0], ast.Constant):
                found.append((node.lineno, str(node.args[0].value)))
    return found


def ours(module: str) -> list[tuple[int, str]]:
    return [(line, name) for line, name in imports(module) if name.split(".")[0] == "cenote"]


def test_every_room_of_the_house_has_a_rule() -> None:
    assert {room(module) for module in MODULES} <= set(ALLOWED)


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_the_rooms_below_it(module: str) -> None:
    mine = room(module)
    allowed = ALLOWED[mine] | WORDS | {mine}
    assert [f"line {line}: {name}" for line, name in ours(module) if room(name) not in allowed] == []


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) == "core"])
def test_the_core_is_pure(module: str) -> None:
    """It imports nothing that has a clock, a lock, a socket, a log or randomness."""
    foreign = [name for _, name in imports(module) if name.split(".")[0] != "cenote"]
    assert set(foreign) <= TOOLS_OF_THE_CORE
    names = {node.id for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.Name)}
    assert not names & {"open", "print", "input", "exec", "eval", "globals", "__import__"}


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) == "core"])
def test_the_core_keeps_no_state_of_its_own_between_machines(module: str) -> None:
    """At the top level of its modules there are only constants, functions and classes."""
    for node in ast.parse(MODULES[module].read_text()).body:
        if isinstance(node, ast.Assign):
            assert not isinstance(node.value, (ast.List, ast.Dict, ast.Set)), ast.unparse(node)
    assert not [
        n for n in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(n, (ast.Global, ast.Nonlocal))
    ]


def test_the_rule_sees_imports_inside_functions_and_relative_ones() -> None:
    """A rule that finds nothing may only be blind."""
    everything = {name for module in MODULES for _, name in imports(module)}
    assert {"cenote.core.machine", "cenote.errors", "psycopg"} <= everything


LIGHT = ["cenote", "cenote.pool", "cenote.errors", "cenote.core.machine", "cenote.sql", "cenote.config"]


def loaded_by(module: str) -> dict[str, str]:
    """Top-level names of everything in `sys.modules` after importing `module`, with their files."""
    code = (
        "import json, sys\n"
        "old = set(sys.modules)\n"
        f"import {module}\n"
        "print(json.dumps({n: getattr(m, '__file__', '') or '' for n, m in sys.modules.items() if n not in old}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("module", LIGHT)
def test_importing_the_pool_loads_no_third_party_package(module: str) -> None:
    loaded = loaded_by(module)
    assert module in loaded
    foreign = {
        name
        for name, file in loaded.items()
        if name.split(".")[0] not in sys.stdlib_module_names and name.split(".")[0] != "cenote" and file
    }
    assert foreign == set()


READERS = {"config", "embedded"}
# What libpq reads where an address leaves something out.
READER_MODULES = {"cenote.proxy.url"}


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) not in READERS and m not in READER_MODULES])
def test_no_environment_variable_is_read_outside_the_configuration(module: str) -> None:
    found = []
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "getenvb"):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            found += [
                f"line {node.lineno}: {a.name}" for a in node.names if a.name.startswith(("environ", "getenv"))
            ]
    assert found == []
