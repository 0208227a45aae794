"""Compiled or not, one source: the rules for hot modules, and which build is under test."""

import ast
import importlib
import importlib.machinery
import re
from pathlib import Path

import pytest

from cenote.core import machine

SOURCE = Path(__file__).parents[2] / "src"
CALLS = SOURCE / "cenote" / "proxy" / "syscalls.pxd"
HOT = sorted(path for path in SOURCE.rglob("*.pxd") if path != CALLS)
EXTENSIONS = tuple(importlib.machinery.EXTENSION_SUFFIXES)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def test_the_machine_is_hot() -> None:
    assert SOURCE / "cenote" / "core" / "machine.pxd" in HOT


@pytest.mark.parametrize("path", HOT, ids=module_name)
def test_each_file_of_c_types_lies_beside_its_source(path: Path) -> None:
    assert path.with_suffix(".py").is_file()


def test_there_is_no_second_implementation_but_of_three_system_calls() -> None:
    assert [*SOURCE.rglob("*.pyx"), *SOURCE.rglob("*.pxi")] == []
    assert [path for path in HOT if "cdef inline" in path.read_text()] == []
    in_c = re.findall(r"^cdef inline \S+ (\w+)\((.*)\)", CALLS.read_text(), re.MULTILINE)
    written = {name: [word.split()[-1] for word in words.split(", ")] for name, words in in_c}
    source = ast.parse(CALLS.with_suffix(".py").read_text())
    functions = [node for node in source.body if isinstance(node, ast.FunctionDef)]
    assert written == {node.name: [each.arg for each in node.args.args] for node in functions}
    assert written.keys() == {"receive", "send", "ready"}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=module_name)
def test_the_source_does_not_know_of_the_compiler(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not [alias for alias in node.names if alias.name.split(".")[0].lower() == "cython"]
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0].lower() != "cython"


def attributes_set(cls: ast.ClassDef) -> set[str]:
    return {
        target.attr
        for node in ast.walk(cls)
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
    }


def declared_in(path: Path) -> dict[str, tuple[str, set[str]]]:
    """The classes of a .pxd: the name of the base, and the attributes of their own."""
    found: dict[str, tuple[str, set[str]]] = {}
    name = ""
    for line in path.read_text().splitlines():
        words = line.split("#")[0].split()
        if words[:2] == ["cdef", "class"]:
            name, _, base = words[2].rstrip(":").rstrip(")").partition("(")
            found[name] = (base, set())
        elif words[:1] == ["cdef"] and "(" not in line and line.startswith(" "):
            found[name][1].update(
                {word.strip(",") for word in words[1:] if word not in ("public", "readonly")} - {""}
            )
    return found


@pytest.mark.parametrize("path", HOT, ids=module_name)
def test_each_attribute_of_a_hot_class_is_declared(path: Path) -> None:
    """An attribute that only one of the two files knows fails in one build and not in the other."""
    known = {name: declared for hot in HOT for name, declared in declared_in(hot).items()}
    source = ast.parse(path.with_suffix(".py").read_text())
    classes = {node.name: node for node in ast.walk(source) if isinstance(node, ast.ClassDef)}
    for name, (base, words) in declared_in(path).items():
        while base:
            base, more = known[base]
            words = words | more
        assert attributes_set(classes[name]) <= words, f"{name}: not declared in the .pxd"


def test_the_build_under_test_is_the_one_that_was_asked_for(request: pytest.FixtureRequest) -> None:
    """`--build=pure` and `--build=compiled` say which; without the option it is enough that it is not mixed."""
    asked = request.config.getoption("--build")
    files = {module_name(path): str(importlib.import_module(module_name(path)).__file__) for path in HOT}
    compiled = {name for name, file in files.items() if file.endswith(EXTENSIONS)}
    if asked == "pure":
        assert str(machine.__file__).endswith(".py")
    if asked == "compiled" or (asked is None and compiled):
        assert compiled == set(files)
    else:
        assert compiled == set()
