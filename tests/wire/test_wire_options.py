"""The startup parameter `options` means to us what it means to the server."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire_kit import raw, told

from cenote.embedded import Postgres
from cenote.wire.options import parse_options, split_options
from cenote.wire.refusal import Refusal

TEXTS = [
    "", "   ", "-c work_mem=64", "-cwork_mem=64", "-c  work_mem=64", "--work_mem=64", "--work-mem=64",
    "-c work-mem=64", "-c work_mem=64 -c work_mem=65", "  -c\twork_mem=64\n", "-c search_path=a,\\ b",
    "-c search_path=a\\\\b", "-c application_name=a\\ \\ b\\", "-c application_name=x=y", "-c application_name=",
    "-e", "-d 3", "-d0", "-d -1", "-dx", "-d 6", "-fs -fi", "-f o", "-fb -ft -fn -fm -fh", "-f seqscan", "-fx",
    "-f x", "-f", "-S 100", "-S100", "-s", "-tpa", "-t pl", "-te", "-tpx", "-t", "-t x", "-sF", "-se -S70", "-O",
    "-P", "-W 0", "-B 10", "-F", "-h x", "-i", "-k x", "-l", "-N 5", "-p 1", "-b -E -j -n -T", "-C x", "-D /x",
    "-r x", "-v 3", "-x", "-sx", "-xs", "-s -xs", "foo", "foo -s", "-s foo", "foo -xs", "a -s b -xs", "a -s -xs",
    "--", "-- foo", "-s -- -s", "-", "-c", "-c work_mem", "--work_mem", "--single", "--boot", "--check",
    "--describe-config", "--single=1", "--forkchild", "-c =1", "--=1", "-c nosuchthing=1", "-c work_mem=bad",
    "-c -s", "-:", "-c\\ work_mem=64", "\\", "-S \\", "-c TimeZone=Europe/Paris -c DateStyle=ISO,\\ DMY", "-s-e",
    "-sc work_mem=64", "-cwork_mem=64 -d2 -fs foo bar",
]  # fmt: skip

ENDS_BEFORE = "-c nosuchthing=1 -x"


def outcome(server: Postgres, parameters: list[tuple[bytes, bytes]]) -> object:
    """What a session of the superuser has been set to by its client, or the error that ended it."""
    with raw(server) as client:
        who = [(b"user", b"postgres"), (b"database", server.database.encode())]
        kind, body = client.log_in([*who, *parameters], server.password)[-1]
        if kind == b"E":
            return told(body)
        return client.query("SELECT name, setting FROM pg_settings WHERE source = 'client' ORDER BY name")


def ours(server: Postgres, text: bytes) -> object:
    """The same by the settings that we read from the text."""
    try:
        return outcome(server, parse_options(text))
    except Refusal as refusal:
        words = {"S": "FATAL", "V": "FATAL", "C": refusal.sqlstate, "M": refusal.text, "H": refusal.hint}
        return {letter: word for letter, word in words.items() if word}


@pytest.mark.pg
@pytest.mark.parametrize("text", TEXTS)
def test_A10_the_server_understands_the_same(pg18: Postgres, text: str) -> None:
    assert ours(pg18, text.encode()) == outcome(pg18, [(b"options", text.encode())])


@pytest.mark.pg
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.lists(
        st.sampled_from(
            ["-", "c", "s", "f", "S", "e", "t", "pa", "x", "--", " ", " ", "\\", "work_mem=70", "=", "é"]
        ),
        max_size=10,
    ).map("".join)
)
def test_A10_any_command_line_means_the_same_to_the_server(pg18: Postgres, text: str) -> None:
    theirs = outcome(pg18, [(b"options", text.encode())])
    mine = ours(pg18, text.encode())
    # The server complains of the first thing; we read the whole line before a setting is looked at.
    if isinstance(theirs, dict) and isinstance(mine, dict):
        assert theirs == mine or theirs["C"] != "42601"
    else:
        assert theirs == mine


def test_A10_a_line_that_cannot_be_read_is_refused_before_its_settings_are_looked_at() -> None:
    with pytest.raises(Refusal, match="invalid command-line argument for server process: -x"):
        parse_options(ENDS_BEFORE.encode())


def test_A10_a_setting_without_a_name_never_reaches_a_startup_packet() -> None:
    with pytest.raises(Refusal) as caught:
        parse_options(b"-c =1")
    assert caught.value.sqlstate == "42704"


def test_A10_bytes_that_are_no_text_pass_unchanged() -> None:
    assert parse_options(b"-c a=\xff\xfe") == [(b"a", b"\xff\xfe")]


@pytest.mark.parametrize(
    ("text", "words"),
    [(b"a b", [b"a", b"b"]), (b"a\\ b", [b"a b"]), (b"a\\\\ b", [b"a\\", b"b"]), (b"\\", [b""]), (b"a\\", [b"a"]),
     (b" \t\n\v\f\ra", [b"a"]), (b"\\-\\c", [b"-c"]), (b"a\\\tb", [b"a\tb"]), (b"a \\ b", [b"a", b" b"])],
)  # fmt: skip
def test_A10_words_are_divided_by_spaces_unless_a_backslash_says_otherwise(
    text: bytes, words: list[bytes]
) -> None:
    assert split_options(text) == words


@given(st.binary(max_size=200) | st.text(alphabet="-csfdtSBx=\\ a", max_size=60).map(str.encode))
def test_no_command_line_does_worse_than_be_refused(text: bytes) -> None:
    try:
        found = parse_options(text)
    except Refusal as refusal:
        said = refusal.sqlstate
    else:
        assert sum(len(value) for _, value in found) <= 10 * len(text)
        said = ""
    assert said in ("", "42601", "42704")
