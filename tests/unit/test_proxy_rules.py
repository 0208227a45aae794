"""Rules in the form of pg_hba.conf: what each line means, what is refused, and that no text does harm."""

import re
import time
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.errors import ConfigError
from cenote.proxy.auth.interfaces import own_networks
from cenote.proxy.auth.lines import made_of
from cenote.proxy.auth.patterns import pattern
from cenote.proxy.auth.rules import METHODS, Arrival, Rule, Rules, load_rules, parse_rules, read_address
from cenote.proxy.config import config_of
from cenote.proxy.problems import warnings_of

HOST = ip_address("192.0.2.7")


def arrival(user="ann", database="shop", address="192.0.2.7", **more) -> Arrival:
    return Arrival(user, database, address=ip_address(address) if address else None, **more)


def local(user="ann", database="shop", **more) -> Arrival:
    return Arrival(user, database, local=True, **more)


def matches(line: str, who: Arrival) -> bool:
    return parse_rules(line, "hba").match(who) is not None


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_rules(text, "hba")
    return list(caught.value.problems)


# -- the form -----------------------------------------------------------------------------------------------------


def words(text: str) -> list[list[list[tuple[str, bool]]]]:
    """Lines of fields of words, and whether each is quoted."""
    return made_of(text, "hba", lambda _, fields: [[tuple(word)[:2] for word in field] for field in fields])


def test_words_with_commas_between_them_are_one_field() -> None:
    assert words('a b,c, d ,e\t"f g",h') == [
        [
            [("a", False)],
            [("b", False), ("c", False), ("d", False)],
            [("e", False)],
            [("f g", True), ("h", False)],
        ]
    ]


def test_quotes_keep_blanks_commas_hashes_and_double_themselves() -> None:
    assert words('"a, #b" """" "" x"y z"w a"b""c"') == [
        [[("a, #b", True)], [('"', True)], [("", True)], [("xy zw", False)], [('ab"c', False)]]
    ]


def test_a_comment_ends_the_line_wherever_it_begins() -> None:
    assert words("# one\n  # two\na b#c d\n\n , \n") == [[[("a", False)], [("b", False)]]]


def test_a_backslash_at_its_end_continues_a_line_and_its_number_is_the_first() -> None:
    assert [(line, len(fields)) for line, fields in numbered("a \\\nb\\\n c\n\nd\n# x \\\n y\ne\\")] == [
        (1, 3),
        (5, 1),
        (8, 1),
    ]


def test_two_backslashes_and_two_line_ends_are_one_backslash() -> None:
    assert words("a\\\\\n\nb") == [[[("a\\", False)]], [[("b", False)]]]


def test_lines_may_end_as_on_windows() -> None:
    assert words("a b\r\nc \\\r\nd\r\n") == [[[("a", False)], [("b", False)]], [[("c", False)], [("d", False)]]]


def numbered(text: str) -> list:
    return made_of(text, "hba", lambda number, fields: (number, fields))


# -- what a line matches ------------------------------------------------------------------------------------------


def test_the_first_line_that_matches_decides() -> None:
    rules = parse_rules(
        "host shop ann all reject\nhost shop all all md5\nhost all all all scram-sha-256\nlocal all all trust",
        "hba",
    )
    found = [rules.match(who) for who in (arrival(), arrival("bob"), arrival("bob", "other"), local())]
    assert [(rule.method, rule.line) for rule in found] == [
        ("reject", 1),
        ("md5", 2),
        ("scram-sha-256", 3),
        ("trust", 4),
    ]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("local", {"local"}),
        ("host", {"plain", "tls"}),
        ("hostssl", {"tls"}),
        ("hostnossl", {"plain"}),
        ("hostnogssenc", {"plain", "tls"}),
    ],
)
def test_the_kind_of_a_line_is_the_way_a_client_came(kind, expected) -> None:
    line = f"{kind} all all {'' if kind == 'local' else 'all'} trust"
    ways = {"local": local(), "plain": arrival(), "tls": arrival(tls=True)}
    assert {name for name, way in ways.items() if matches(line, way)} == expected


@pytest.mark.parametrize(
    ("words", "user", "database", "expected"),
    [
        ("all all", "ann", "shop", True),
        ("shop,other ann,bob", "bob", "other", True),
        ("shop ann", "ann", "shopping", False),
        ("shop ann", "Ann", "shop", False),
        ("sameuser all", "ann", "ann", True),
        ("sameuser all", "ann", "shop", False),
        ('"all" all', "ann", "shop", False),
        ('"all" "all"', "all", "all", True),
        ('"sameuser" all', "ann", "ann", False),
        ("replication all", "ann", "replication", False),
        ('"replication" all', "ann", "replication", True),
        ('all "+ops"', "+ops", "shop", True),
        ("/^sh all", "ann", "shop", True),
        ("/^op all", "ann", "shop", False),
        ("/op$ /^a", "ann", "shop", True),
        ('"/^two words$" all', "ann", "two words", True),
        ("/^shop$ all", "ann", "shop\n", False),
        ("all /.", "\n", "shop", True),
    ],
)
def test_databases_and_users_are_names_keywords_or_expressions(words, user, database, expected) -> None:
    assert matches(f"host {words} all trust", arrival(user, database)) is expected


def test_replication_without_a_database_matches_the_word_replication_only() -> None:
    physical = arrival(physical=True, database="ann")
    for databases, expected in (("replication", True), ("all", False), ("ann", False), ("sameuser", False)):
        assert matches(f"host {databases} all all trust", physical) is expected


@pytest.mark.parametrize(
    ("network", "address", "expected"),
    [
        ("192.0.2.0/24", "192.0.2.7", True),
        ("192.0.2.99/24", "192.0.2.7", True),
        ("192.0.2.0/24", "192.0.3.7", False),
        ("192.0.2.7/32", "192.0.2.7", True),
        ("0.0.0.0/0", "192.0.2.7", True),
        ("0.0.0.0/0", "2001:db8::1", False),
        ("::/0", "192.0.2.7", False),
        ("2001:db8::/32", "2001:db8:1::5", True),
        ("2001:db9::/32", "2001:db8:1::5", False),
        ("192.0.2.0 255.255.255.0", "192.0.2.7", True),
        ("192.0.2.0 255.0.0.255", "192.9.9.0", True),
        ("192.0.2.0 255.0.0.255", "192.0.2.7", False),
        ("2001:db8:: ffff:ffff::", "2001:db8:1::5", True),
        ("all", "2001:db8::1", True),
        ("all", "", True),
        ("0.0.0.0/0", "", False),
    ],
)
def test_addresses_are_compared_where_the_mask_has_ones(network, address, expected) -> None:
    assert matches(f"host all all {network} trust", arrival(address=address)) is expected


def test_samehost_and_samenet_are_asked_of_the_interfaces() -> None:
    ours = [(ip_address("192.0.2.9"), ip_address("255.255.255.0")), (ip_address("::1"), ip_address("::1"))]
    for word, seen in (("samehost", ["192.0.2.9"]), ("samenet", ["192.0.2.9", "192.0.2.7"])):
        rules = Rules(parse_rules(f"host all all {word} trust", "hba").rules, lambda: ours)
        found = ["192.0.2.9", "192.0.2.7", "198.51.100.1", "2001:db8::2"]
        assert [one for one in found if rules.match(arrival(address=one))] == seen


def test_this_machine_has_its_loopback() -> None:
    assert (ip_address("127.0.0.1"), ip_address("255.0.0.0")) in own_networks()
    assert matches("host all all samehost trust", arrival(address="127.0.0.1"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("fe80::1%eth0", "fe80::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("gone", None),
        ("", None),
    ],
)
def test_an_address_is_read_in_every_form_it_comes_in(text, expected) -> None:
    assert str(read_address(text)) == str(expected)


def test_options_say_what_certificates_are_for() -> None:
    (rule,) = parse_rules(
        'hostssl all all all md5 clientcert=verify-ca clientname=DN\n', "hba"
    ).rules  # fmt: skip
    assert (rule.clientcert, rule.clientname, rule.map) == ("verify-ca", "DN", "")
    (rule,) = parse_rules('hostssl all all all cert "map=of the staff"', "hba").rules
    assert (rule.clientcert, rule.clientname, rule.map) == ("verify-full", "CN", "of the staff")


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("hostgssenc all all all trust", "GSS is not spoken"),
        ("hots all all all trust", "did you mean host?"),
        ("host,local all all all trust", "more than one kind"),
        ("host", "ends before its databases"),
        ("host all", "ends before its users"),
        ("host all all", "ends before its address"),
        ("host all all 192.0.2.0", "ends before its mask"),
        ("host all all all", "ends before its method"),
        ("local all all", "ends before its method"),
        ("host samerole all all trust", "known to the server only"),
        ("host samegroup all all trust", "known to the server only"),
        ("host all +ops all trust", "known to the server only"),
        ("host +ops all all trust", "known to the server only"),
        ("host all all db.example trust", "DNS would be on the path"),
        ("host all all .example trust", "DNS would be on the path"),
        ("host all all db.example/24 trust", "DNS would be on the path"),
        ("host all all 192.0.2.0/33 trust", "0 to 32"),
        ("host all all 192.0.2.0/255.255.255.0 trust", "0 to 32"),
        ("host all all 192.0.2.0/ trust", "0 to 32"),
        ("host all all 2001:db8::/129 trust", "0 to 128"),
        ("host all all 192.0.2.0/²4 trust", "0 to 32"),
        ("host all all 192.0.2.0 trust", "no mask"),
        ("host all all 192.0.2.0 ffff:: trust", "different kinds"),
        ("host all all 192.0.2.0/24,198.51.100.0/24 trust", "more than one address"),
        ("host all all all ldap", "is no method"),
        ("host all all all scram", "did you mean scram-sha-256?"),
        ("local all all ident", "write peer"),
        ("host all all all peer", "use it in local lines"),
        ("host all all all cert", "use it in hostssl lines"),
        ("host all all all md5 clientcert=verify-ca", "use it in hostssl lines"),
        ("hostssl all all all cert clientcert=verify-ca", "always means verify-full"),
        ("hostssl all all all md5 clientcert=1", "verify-ca or verify-full"),
        ("hostssl all all all cert clientname=cn", "CN or DN"),
        ("hostssl all all all cert map", "name=value"),
        ("hostssl all all all cert mup=x", "did you mean map?"),
        ("host all all all md5 map=x", "peer and cert"),
        ("host @names all all md5", "other files are not read"),
        ("include other.conf", "other files are not read"),
        ("include_dir conf.d", "other files are not read"),
        ("include_if_exists other.conf", "other files are not read"),
        ('host all "ann all md5', "a quote without an end"),
        ("host all /( all md5", 'regular expression "("'),
        ("", "it has no rules"),
    ],
)
def test_what_cannot_be_meant_here_is_a_problem_with_its_reason(line, problem) -> None:
    (found,) = problems(line)
    assert found.startswith("hba:1: " if line else "hba: ")
    assert problem in found


def test_all_problems_are_told_at_once_with_their_lines() -> None:
    found = problems("host all all all trust\nnonsense\n\nhost all \\\n +ops all trust\nhost all all all gss\n")
    assert [text.split(":")[1] for text in found] == ["2", "4", "6"]


def test_a_file_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_rules(tmp_path / "nothing")
    (tmp_path / "latin").write_bytes(b"host all bj\xf6rn all trust\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_rules(tmp_path / "latin")


def whole(tmp_path: Path, rules: str = "", maps: str | None = None, **listen) -> dict:
    (tmp_path / "hba").write_text(rules)
    config = {
        "rules_file": str(tmp_path / "hba"),
        "databases": {"shop": {"host": "db.example", "sslmode": "disable"}},
        "users": {"ann": {}},
        "listen": listen,
    }
    if maps is not None:
        (tmp_path / "ident").write_text(maps)
        config["map_file"] = str(tmp_path / "ident")
    return config


def test_a_configuration_tells_the_problems_of_rules_and_maps_with_all_others(tmp_path: Path) -> None:
    values = whole(tmp_path, "host all all all gss\n", "a b\n", tls_mode="require", tls_ca="ca.crt")
    with pytest.raises(ConfigError) as caught:
        config_of(values, complete=True)
    told = "\n".join(caught.value.problems)
    for text in (
        f"rules_file: {tmp_path}/hba:1: ",
        f"map_file: {tmp_path}/ident:1: ",
        "tls_mode",
        "listen.tls_ca",
    ):
        assert text in told
    assert len(caught.value.problems) == 4


def test_what_rules_need_of_the_rest_is_a_problem_where_it_is_missing(tmp_path: Path) -> None:
    values = whole(
        tmp_path, "hostssl all all all cert map=stuff\nhostssl all all all md5 clientcert=verify-ca\n", "staff a b"
    )
    with pytest.raises(ConfigError) as caught:
        config_of(values, complete=True)
    assert [(text.split(": ")[1].rsplit(":")[-1], text.rpartition(" ")[2]) for text in caught.value.problems] == [
        ("1", "by"),
        ("1", "'staff'?"),
        ("2", "by"),
    ]


def test_maps_without_rules_are_a_problem(tmp_path: Path) -> None:
    values = whole(tmp_path, maps="a b c")
    del values["rules_file"]
    with pytest.raises(ConfigError, match="map_file: only rules name maps"):
        config_of(values)


def test_with_rules_a_user_needs_no_password_and_trust_is_warned_of(tmp_path: Path) -> None:
    config = config_of(whole(tmp_path, "local all all trust\nhost all all samehost trust\n"), complete=True)
    (warning,) = warnings_of(config)
    assert "hba:2: " in warning


# -- regular expressions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("^a.c$", "a\nc", True),
        ("^abc$", "abc\n", False),
        ("a|b$", "xb", True),
        (r"\$$", "x$", True),
        ("[$]", "$", True),
        ("[]x]", "]", True),
        ("[^]x]", "]", False),
        (r"^\w+$", "caf\u00e9", False),
        ("(?i)^ANN", "anna", True),
        ("^(app|web)(_ro|_rw)?$", "web_ro", True),
        ("^[a-z]{2,3}$", "abcd", False),
    ],
)
def test_expressions_mean_what_they_mean_to_postgresql(text, name, expected) -> None:
    assert (pattern(text).search(name) is not None) is expected


@pytest.mark.parametrize(
    "text",
    [r"\m", r"\y", r"\bx", r"\Bx", "[[:alpha:]]", "[a--b]", "(?P<x>a)", "(?#x)", "(", ")", "[", "*", "a**", "{1}",
     "\\", "\0", r"[\bx]", "a{2,1}", "a{99999999999999}", "x{"],
)  # fmt: skip
def test_expressions_that_the_two_read_differently_are_refused(text) -> None:
    with pytest.raises(ValueError, match=r"."):
        pattern(text)


@pytest.mark.parametrize(
    "text", ["(a+)+$", "(a|a)*$", "(a|aa)+$", "((a?){3}){60}$", "a?" * 30 + "a" * 30, "(a*)*b"]
)
def test_expressions_that_could_take_forever_are_refused(text) -> None:
    with pytest.raises(ValueError, match="could take forever"):
        pattern(text)


@given(st.text(alphabet="ab.*+?|()[]{}^$\\-123,", max_size=24))
def test_whatever_is_taken_as_an_expression_ends_in_good_time(text) -> None:
    try:
        found = pattern(text)
    except ValueError:
        return
    for name in ("a" * 63, "ab" * 31, "a" * 62 + "b", "\n" * 63):
        begun = time.process_time()
        found.search(name)
        assert time.process_time() - begun < 1, text


# -- any text -----------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    ["host", "local", "hostssl", "all", "sameuser", "replication", "+x", "/a", "/(", '"', '""', "\\\n", "\\", "\n",
     " ", ",", "#", "192.0.2.0/24", "10.0.0.1", "255.0.0.0", "::1/128", "/", "=", "map=", "clientcert=verify-ca",
     "@f", "include", "\r\n", "\0", *METHODS]
)  # fmt: skip


def rules_or_problems(text: str) -> Rules | list[str]:
    try:
        return parse_rules(text, "hba")
    except ConfigError as error:
        return list(error.problems)


@given(st.lists(PIECES | st.text(max_size=5), max_size=40).map(" ".join) | st.text())
def test_whatever_the_file_says_it_is_rules_or_problems_with_their_lines(text) -> None:
    rules = rules_or_problems(text)
    if not isinstance(rules, Rules):
        assert rules
        assert all(re.match(r"hba:(\d+:)? ", problem) for problem in rules)
        return
    for who in (arrival(), arrival(address="", tls=True), local(), arrival(physical=True)):
        found = rules.match(who)
        assert found is None or isinstance(found, Rule)


@given(st.text(), st.text(), st.booleans())
def test_whoever_asks_gets_a_rule_or_none(user, database, tls) -> None:
    rules = parse_rules("hostssl sameuser,/^x all samenet md5\nhost all /b$,ann 192.0.2.0/24 trust", "hba")
    found = rules.match(Arrival(user, database, address=HOST, tls=tls))
    assert found is None or found.line in (1, 2)
