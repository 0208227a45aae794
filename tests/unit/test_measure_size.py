"""What `cenote size` is made of, without a server: the mix, the law, the words and the picture."""

import io
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from cenote.cli.size import fitting, rows
from cenote.errors import ConfigError
from cenote.measure import ink, page
from cenote.measure.curve import Law, fit
from cenote.measure.expression import BadExpression, parse_expression
from cenote.measure.mix import Mix, Set, Sleep, Source, Statement, parse_definitions, parse_mix, weighted
from cenote.measure.rounds import bucket, latency_s
from cenote.measure.size import Level, Others, Result, Setup, steps
from cenote.measure.size_findings import Fleet, advice, answer, as_dict, explained, marked
from cenote.measure.size_picture import SIZE, drawing
from cenote.measure.statements import Statement as Counted
from cenote.measure.target import Target

pytestmark = pytest.mark.interpreted

TPCB = r"""
-- as pgbench's own script
\set aid random(1, 100000 * :scale)
\set delta random(-5000, 5000)
BEGIN;
UPDATE pgbench_accounts SET abalance = abalance + :delta WHERE aid = :aid;
SELECT ';' AS "not;an end", '\set' FROM t WHERE x::int = 1; /* ; */
\sleep 10 ms
END;
"""


# -- the mix ----------------------------------------------------------------------------------------------------


def test_a_script_is_cut_where_the_servers_lexer_would_cut_it() -> None:
    (script,) = parse_mix([Source("s", TPCB)]).scripts
    kinds = [type(step) for step in script.steps]
    assert kinds == [Set, Set, Statement, Statement, Statement, Sleep, Statement]
    update = script.steps[3]
    assert isinstance(update, Statement)
    values: dict[str, int | float] = {"aid": 7, "delta": -3}
    assert update.simple(values) == b"UPDATE pgbench_accounts SET abalance = abalance + -3 WHERE aid = 7"
    assert update.prepared() == b"UPDATE pgbench_accounts SET abalance = abalance + $1 WHERE aid = $2"
    assert update.values(values) == [b"-3", b"7"]


def test_a_cast_is_not_a_variable() -> None:
    (script,) = parse_mix([Source("s", "\\set int 1\nSELECT x::int, :int")]).scripts
    last = script.steps[-1]
    assert isinstance(last, Statement)
    assert last.simple({"int": 1}) == b"SELECT x::int, 1"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("SELECT 1;\n\\gset\n", 2, "\\gset is not supported"),
        ("\n\n\\if :x\nSELECT 1;", 3, "\\if is not supported"),
        ("SELECT 1\n\\set x 1\n", 2, "end the statement with ;"),
        ("\\set x md5(1)\nSELECT 1", 1, "'md5' is not understood"),
        ("\\set x random(1)\nSELECT 1", 1, "random takes 2 arguments"),
        ("\\set x :nobody + 1\nSELECT 1", 1, ":nobody has no value"),
        ("\\set x (1 + 2\nSELECT 1", 1, "ends too early"),
        ("\\set 1x 2\nSELECT 1", 1, "needs a name"),
        ("SELECT 1;\nSELECT 'never closed", 2, "a quote or a comment without an end"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_line(text: str, line: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_mix([Source("orders.sql", text)])
    (problem,) = caught.value.problems
    assert problem.startswith(f"orders.sql, line {line}: ")
    assert words in problem


def test_every_problem_of_a_mix_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_mix(
            [Source("a", "\\foo\nSELECT 1;\n\\bar\n"), Source("b", " -- nothing"), Source("c", "SELECT 1", 0)]
        )
    problems = caught.value.problems
    assert len(problems) == 4
    assert "a, line 1" in problems[0]
    assert "a, line 3" in problems[1]
    assert "no SQL statement" in problems[2]
    assert "weight of 0" in problems[3]


def test_a_weight_stands_before_the_sql_and_decides_how_often_it_is_drawn() -> None:
    sources = [weighted("a", "3: SELECT 1"), weighted("b", "SELECT 2")]
    assert [(source.text, source.weight) for source in sources] == [("SELECT 1", 3), ("SELECT 2", 1)]
    mix: Mix = parse_mix(sources)
    chance = random.Random(1)
    drawn = Counter(mix.draw(chance).name for _ in range(4000))
    assert 2850 < drawn["a"] < 3150


def test_definitions_are_numbers_with_names() -> None:
    assert parse_definitions(["scale=10", "x=-1.5"]) == {"scale": 10, "x": -1.5}
    with pytest.raises(ConfigError) as caught:
        parse_definitions(["scale", "y=ten"])
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("-7 / 2", -3),
        ("-7 % 3", -1),
        ("7 / 2.0", 3.5),
        ("- - 2", 2),
        ("10 - 3 - 2", 5),
        ("abs(-4) + greatest(1, 2, :n)", 44),
        ("int(3.9)", 3),
        ("1e1", None),
    ],
)
def test_expressions_mean_what_pgbench_says(text: str, value: float | None) -> None:
    if value is None:
        with pytest.raises(BadExpression):
            parse_expression(text, ())
        return
    found = parse_expression(text, {"n"})({"n": 40}, random.Random(1))
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "call",
    ["random(3, 9)", "random_gaussian(3, 9, 2.5)", "random_exponential(3, 9, 2)", "random_zipfian(3, 9, 1.2)"],
)
def test_every_random_function_reaches_its_whole_range_and_nothing_else(call: str) -> None:
    draw = parse_expression(call, ())
    chance = random.Random(5)
    assert {draw({}, chance) for _ in range(5000)} == set(range(3, 10))


@pytest.mark.parametrize("text", ["1 / 0", "1 % 0", "random(5, 1)", "random_gaussian(1, 2, 1)", "1.5 % 2"])
def test_an_expression_that_cannot_be_computed_says_why(text: str) -> None:
    value = parse_expression(text, ())
    with pytest.raises(BadExpression):
        value({}, random.Random(1))


# -- the law ----------------------------------------------------------------------------------------------------


def planted(law: Law, levels: list[int], noise: float, rounds: int = 4) -> dict[int, list[float]]:
    chance = random.Random(7)
    return {n: [law.at(n) * (1 + chance.gauss(0, noise)) for _ in range(rounds)] for n in levels}


@pytest.mark.parametrize("noise", [0.002, 0.02])
def test_the_law_that_made_the_figures_is_found_again(noise: float) -> None:
    law = Law(1000.0, 0.10, 0.01)
    found = fit(planted(law, steps(24), noise))
    assert found.law.rate == pytest.approx(law.rate, rel=0.05)
    assert found.law.contention == pytest.approx(law.contention, abs=0.03)
    assert found.law.coherency == pytest.approx(law.coherency, abs=0.003)
    assert found.law.ceiling is None
    assert found.knee_low <= law.knee(24) <= found.knee_high
    assert found.saturated


@pytest.mark.parametrize("tokens", [2, 4, 8])
def test_a_hard_limit_is_recognised_and_its_knee_found_exactly(tokens: int) -> None:
    law = Law(200.0, 0.0, 0.0, ceiling=200.0 * tokens)
    found = fit(planted(law, steps(4 * tokens), 0.01))
    assert found.law.ceiling == pytest.approx(200 * tokens, rel=0.03)
    assert (found.knee, found.measured_knee) == (tokens, tokens)


def test_without_a_hard_limit_no_ceiling_is_invented() -> None:
    for law in (Law(1000.0, 0.5, 0.0), Law(1000.0, 0.0, 0.0), Law(500.0, 1.0, 0.02)):
        assert fit(planted(law, steps(24), 0.02)).law.ceiling is None


def test_a_server_that_still_grows_has_no_knee() -> None:
    found = fit(planted(Law(1000.0, 0.0, 0.0), steps(16), 0.01))
    assert not found.saturated


def test_a_last_level_close_to_the_one_before_makes_no_knee_of_a_straight_line() -> None:
    # One round has 1,634 per second with 33 where a straight line has 1,650.
    found = fit({**planted(Law(50.0, 0.0, 0.0), steps(33), 0.0005), 33: [1634.0, 1633.0, 1635.0, 1634.0]})
    assert found.law.ceiling is None
    assert not found.saturated


def test_noise_widens_the_interval_and_the_band() -> None:
    law = Law(1000.0, 0.2, 0.004)
    quiet, loud = (fit(planted(law, steps(48), noise)) for noise in (0.005, 0.10))
    assert loud.knee_high - loud.knee_low > quiet.knee_high - quiet.knee_low
    assert loud.band[8][1] - loud.band[8][0] > quiet.band[8][1] - quiet.band[8][0]
    assert quiet.band[8][0] <= quiet.law.at(8) <= quiet.band[8][1]


def test_too_little_is_not_fitted() -> None:
    with pytest.raises(ValueError, match="three levels"):
        fit({1: [10.0], 2: [20.0]})


# -- levels and latencies ---------------------------------------------------------------------------------------


def test_the_steps_grow_by_half_or_a_third_and_end_at_the_bound() -> None:
    assert steps(4) == [1, 2, 3, 4]
    assert steps(20) == [1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert steps(32) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]


def test_percentiles_of_counted_latencies_are_within_their_step() -> None:
    values = [0.001 * n for n in range(1, 1001)]
    counts = Counter(map(bucket, values))
    for share in (0.5, 0.95, 0.99, 1.0):
        assert latency_s(counts, share) == pytest.approx(share, rel=0.021)
    assert latency_s(Counter(), 0.5) is None


def test_wrong_values_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        Setup(most=1, seconds=1.0, protocol="extended", sources=(Source("s", "\\foo"),)).check()
    assert len(caught.value.problems) == 4


# -- words and pictures -----------------------------------------------------------------------------------------


def result(law: Law, *, most: int = 24, local: bool = True, **target: Any) -> Result:
    points = planted(law, steps(most), 0.01)
    server = {
        "dsn": "x", "host": "h", "port": 5432, "database": "shop", "user": "app", "version": 160004,
        "max_connections": 100, "reserved": 3, "others": 12, "superuser": False,
        "server_pid": 1 if local else None, "embedded": False,
    }  # fmt: skip
    levels = tuple(
        Level(n, tuple(points[n]), 100, {}, 0.001 * n, 0.002 * n, 0.003 * n, {"Lock": 0.25, "LWLock": 0.05},
              1000.0 * n if local else None, 0.4 if local else None, 0.2 if local else None, 0.2)
        for n in sorted(points)
    )  # fmt: skip
    counted = (Counted(1000, 0.002, "SELECT 1"), Counted(1000, 0.004, "SELECT 2"))
    return Result(
        Setup(), Target(**{**server, **target}), levels, fit(points), "certain", 10.0, 0.2, 2 if local else None,
        (Others("PgBouncer", 12),), counted,
    )  # fmt: skip


SHARP = Law(200.0, 0.0, 0.0, ceiling=1600.0)


def test_the_pool_size_is_divided_among_the_processes() -> None:
    found = advice(result(SHARP), Fleet(2, 3), None, 1)
    assert (found.total, found.each, found.usable, found.formula) == (8, 1, 85, 5)
    assert found.each_most == 85 // 12


def test_more_processes_than_connections_serve_best_are_sent_to_a_proxy() -> None:
    measured, fleet = result(SHARP), Fleet(10, 4)
    found = advice(measured, fleet, None, 1)
    words = " ".join(explained(measured, fleet, found))
    assert found.each == 0
    assert "cenote serve" in words
    assert "80 processes hold up to 80 connections, which fits" in words


def test_a_deployment_that_does_not_fit_is_told() -> None:
    measured, fleet = result(SHARP, max_connections=60), Fleet(10, 4)
    words = " ".join(explained(measured, fleet, advice(measured, fleet, None, 1)))
    assert "which does not fit into 45" in words
    assert Fleet(10, 4, overlap=0.25).deploying == 48


def test_the_words_carry_the_figures() -> None:
    measured = result(SHARP)
    found = advice(measured, Fleet(), None, 1)
    words = " ".join([answer(measured), *explained(measured, Fleet(), found)])
    for expected in ("Pool size: 8", "hard limit", "12 of PgBouncer", "2,000 times, 3 ms on average", "gives 5"):
        assert expected in words


def test_what_is_not_known_of_a_remote_server_is_left_out() -> None:
    measured = result(SHARP, local=False)
    found = advice(measured, Fleet(), None, 1)
    words = " ".join(explained(measured, Fleet(), found))
    assert found.formula is None
    assert "not known from here (--cores)" in words
    assert "context switches" not in words
    assert advice(measured, Fleet(), 8, 1).formula == 17


def test_without_a_knee_none_is_claimed() -> None:
    assert answer(result(Law(1000.0, 0.0, 0.0), most=16)).startswith("No knee up to 16 connections")


def test_what_is_derived_from_no_knee_does_not_speak_of_one() -> None:
    measured, fleet = result(Law(1000.0, 0.0, 0.0), most=8), Fleet(10, 4)
    words = " ".join(explained(measured, fleet, advice(measured, fleet, None, 1)))
    assert "8 connections are the least that is safe to say: not even one each" in words
    for claim in ("serve best", "The knee", "Bigger", "hard limit"):
        assert claim not in words


def test_a_knee_between_two_levels_is_shown_at_the_upper_one() -> None:
    measured = result(Law(200.0, 0.0, 0.0, ceiling=1000.0))
    assert measured.fit.knee == 5
    assert [level.connections for level in measured.levels if marked(level, measured)] == [6]
    words = " ".join(explained(measured, Fleet(), advice(measured, Fleet(), None, 1)))
    assert "Bigger: from 6 to 24 connections" in words


def test_the_json_has_every_level_and_the_fit() -> None:
    measured = result(SHARP)
    figures = as_dict(measured, Fleet(), advice(measured, Fleet(), None, 1))
    assert [level["connections"] for level in figures["levels"]] == steps(24)
    assert figures["fit"]["knee"] == 8
    assert figures["levels"][3]["locked"] == pytest.approx(0.3)
    assert "password" not in str(figures)


def test_the_picture_of_a_remote_server_is_drawn_without_what_is_not_seen(tmp_path: Path) -> None:
    measured = result(SHARP, local=False)
    ink.save(drawing(measured, advice(measured, Fleet(), None, 1)), tmp_path / "size.png", size=SIZE)
    assert (tmp_path / "size.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_what_stands_below_the_picture_is_inside_it_however_long_the_servers_name() -> None:
    measured = result(SHARP, host="database-primary.eu-central-1.internal.example.org", database="warehouse")
    figure = Figure(figsize=SIZE)
    FigureCanvasAgg(figure)
    drawing(measured, advice(measured, Fleet(), None, 1))(figure, ink.LIGHT)
    figure.canvas.draw()
    assert all(text.get_window_extent().x1 <= figure.bbox.x1 for text in figure.texts)


@pytest.mark.parametrize("width", [50, 60, 80, 120])
def test_a_narrow_terminal_loses_columns_and_no_part_of_a_figure(width: int) -> None:
    lines = rows(result(Law(20_000.0, 0.0, 0.0, ceiling=160_000.0)))
    out = io.StringIO()
    console = Console(width=width, file=out)
    table, left_out = fitting(lines, console)
    console.print(table)
    shown = out.getvalue()
    assert "…" not in shown
    assert all(line[1] in shown for line in lines)
    assert "<- knee" in shown
    assert bool(left_out) == (width < 100)


def test_the_picture_is_drawn_on_both_papers() -> None:
    measured = result(SHARP)
    draw = drawing(measured, advice(measured, Fleet(), None, 1))
    light, dark = (ink.svg(draw, size=SIZE, ink=each) for each in (ink.LIGHT, ink.DARK))
    assert light != dark
    assert "<svg" in page.page("t", "b", [page.Picture(light, dark, "c")])
