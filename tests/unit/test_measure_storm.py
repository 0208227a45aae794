"""What `cenote storm` simulates: the server's model, the four ways on the real machine; scenarios and words."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cenote.errors import ConfigError
from cenote.measure import ink
from cenote.measure.outcome import WAYS, Outcome
from cenote.measure.scenario import Clients, Costs, Deploy, Load, Restart, Scenario, Server, included, load, parse
from cenote.measure.simulation import Simulation, simulate
from cenote.measure.station import NEVER, Station
from cenote.measure.storm import as_tables, as_toml, changed, run, with_costs
from cenote.measure.storm_findings import HEADINGS, as_dict, disagreements, explained, rows
from cenote.measure.storm_picture import SIZE, drawing

CALM = Scenario(
    "calm",
    server=Server(cores=4, max_connections=50, reserved=3),
    costs=Costs(query_ms=1.0, wait_ms=1.0, contention=0.0, coherency=0.0),
    clients=Clients(instances=4, pool_size=5, min_size=2, timeout_s=2.0),
    load=Load(seconds=4.0, rate=400.0),
)


def accounted(each: Outcome) -> int:
    return each.answered + sum(each.refused.values()) + sum(each.failed.values()) + each.unfinished


# -- the server's model -----------------------------------------------------------------------------------------


def drained(station: Station) -> list[tuple[float, Any]]:
    ended = []
    while station.soonest < NEVER:
        at = station.soonest
        ended.append((at, station.pop()))
    return ended


def test_jobs_share_the_cpus_equally() -> None:
    station = Station(1, 0.0, 0.0)
    station.add(0.0, 1.0, "long")
    station.add(0.0, 0.5, "short")
    assert drained(station) == [(pytest.approx(1.0), "short"), (pytest.approx(1.5), "long")]
    assert station.busy_s == pytest.approx(1.5)


def test_as_many_jobs_as_cpus_do_not_slow_each_other_down() -> None:
    station = Station(2, 0.0, 0.0)
    station.add(0.0, 1.0, "a")
    station.add(0.5, 1.0, "b")
    assert drained(station) == [(pytest.approx(1.0), "a"), (pytest.approx(1.5), "b")]
    assert station.busy_s == pytest.approx(2.0)


def test_contention_and_coherency_slow_everybody_down_by_the_law() -> None:
    station = Station(100, 0.1, 0.01)
    for job in range(4):
        station.add(0.0, 1.0, job)
    first, _ = drained(station)[0]
    assert first == pytest.approx(1 + 0.1 * 3 + 0.01 * 4 * 3)


def test_beyond_what_a_law_was_measured_with_they_get_done_together_what_those_got_done() -> None:
    station = Station(2, 0.1, 0.01, law_to=4)
    law = 1 + 0.1 * 3 + 0.01 * 4 * 3
    assert station.speed(4) == pytest.approx(1 / law)
    assert station.speed(8) == pytest.approx(1 / law / 2)


def test_a_stopped_server_gives_up_its_jobs() -> None:
    station = Station(1, 0.0, 0.0)
    station.add(0.0, 1.0, "a")
    assert station.clear(0.5) == ["a"]
    assert station.soonest == NEVER
    assert station.busy_s == pytest.approx(0.5)


# -- the ways ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["calm", "cliff", "deployment", "restart"])
def test_every_request_ends_exactly_once_and_the_server_is_never_overfull(name: str, way: str) -> None:
    scenario = CALM if name == "calm" else included()[name]
    scenario = replace(scenario, load=replace(scenario.load, seconds=min(10.0, scenario.load.seconds)))
    outcome = simulate(scenario, way)
    assert accounted(outcome) == outcome.requests
    assert outcome.peak <= scenario.usable
    assert all(sample.connections <= scenario.usable for sample in outcome.samples)
    assert outcome.answered == 0 or outcome.latency_s.min() > 0


@pytest.mark.parametrize("way", WAYS)
def test_afterwards_every_machine_and_the_budget_are_in_order(way: str) -> None:
    scenario = replace(CALM, restart=Restart(at_s=1.0, down_s=0.5), deploy=Deploy(at_s=2.0))
    simulation = Simulation(scenario, way, scenario.requests())
    simulation.run()
    for machine in simulation.machines:
        machine.check()
    if simulation.budget is not None:
        simulation.budget.check()


def test_the_same_seed_gives_the_same_storm_and_another_one_another() -> None:
    first, again = simulate(CALM, "local"), simulate(CALM, "local")
    other = simulate(replace(CALM, seed=2), "local")
    assert np.array_equal(first.latency_s, again.latency_s)
    assert not np.array_equal(first.latency_s, other.latency_s)


def test_one_pool_of_one_connection_is_the_queue_that_theory_knows() -> None:
    """M/G/1 by Pollaczek and Khinchine: the mean wait is rate E[S^2] / 2 (1 - load)."""
    scenario = Scenario(
        "queue",
        costs=Costs(query_ms=1.0, wait_ms=0.0, spread=1.0, contention=0.0, coherency=0.0, connect_ms=0.001),
        clients=Clients(instances=1, pool_size=1, min_size=1, timeout_s=600.0, max_waiting=1_000_000),
        load=Load(seconds=200.0, rate=700.0),
    )
    outcome = simulate(scenario, "local")
    expected_s = 0.001 + 700 * 2 * 0.001**2 / (2 * (1 - 0.7))
    assert outcome.answered == outcome.requests
    assert float(outcome.latency_s.mean()) == pytest.approx(expected_s, rel=0.1)


def test_the_proxys_workers_take_requests_one_after_the_other() -> None:
    scenario = replace(
        CALM, load=Load(seconds=1.0, rate=0.0, burst=10), costs=Costs(1.0, 0.0, 0.0, proxy_ms=100.0)
    )
    outcome = simulate(scenario, "proxy")
    spacing = np.diff(np.sort(outcome.latency_s))
    assert spacing == pytest.approx(np.full(9, 0.1), abs=0.01)


def test_without_a_pool_a_burst_is_refused_at_the_cliff_and_through_a_proxy_it_is_not() -> None:
    scenario = replace(CALM, load=Load(seconds=1.0, rate=0.0, burst=2000))
    direct, proxy = simulate(scenario, "none"), simulate(scenario, "proxy")
    assert direct.refused["too_many_connections"] > 0
    assert direct.peak == scenario.usable
    assert proxy.answered == 2000
    assert proxy.opened <= scenario.proxy_size


def test_local_pools_together_want_more_than_the_server_has_and_a_budget_keeps_them_below() -> None:
    scenario = replace(
        CALM,
        clients=replace(CALM.clients, instances=30),
        load=Load(seconds=3.0, rate=200.0, burst=600),
    )
    local, budget = simulate(scenario, "local"), simulate(scenario, "budget")
    assert local.rejected > 0
    assert (budget.rejected, budget.peak <= scenario.budget) == (0, True)


def test_a_restart_breaks_what_runs_and_pools_recover() -> None:
    scenario = replace(CALM, restart=Restart(at_s=2.0, down_s=0.5))
    outcome = simulate(scenario, "local")
    assert outcome.failed.keys() <= {"connection_lost"}
    assert outcome.answered >= 0.95 * outcome.requests
    assert outcome.opened > CALM.clients.instances * CALM.clients.min_size
    direct = simulate(scenario, "none")
    assert direct.failed["server_down"] > 0


def test_during_a_deployment_old_and_new_instances_hold_connections() -> None:
    scenario = replace(
        CALM,
        clients=replace(CALM.clients, min_size=5),
        deploy=Deploy(at_s=1.0, ready_s=0.5, overlap_s=1.5),
    )
    outcome = simulate(scenario, "local")
    assert outcome.answered == outcome.requests
    assert outcome.peak == 2 * 4 * 5
    assert outcome.samples[-1].connections == 4 * 5


def test_a_run_tells_its_progress() -> None:
    seen: Counter[str] = Counter()
    storm = run(CALM, ("none", "proxy"), lambda moment: seen.update([moment.way]))
    assert seen.keys() == {"none", "proxy"}
    assert [each.way for each in storm.outcomes] == ["none", "proxy"]


# -- scenarios --------------------------------------------------------------------------------------------------


def test_the_included_scenarios_are_the_ones_the_help_speaks_of() -> None:
    known = included()
    assert {
        "ten-thousand",
        "fifty-instances",
        "thousand-functions",
        "deployment",
        "restart",
        "cliff",
    } <= known.keys()
    assert known["ten-thousand"].load.rate == 10_000
    assert known["fifty-instances"].clients.instances == 50
    assert known["thousand-functions"].clients.instances == 1000
    assert all(each.text for each in known.values())


def test_requests_come_at_the_rate_and_grow_as_told() -> None:
    scenario = replace(CALM, load=Load(seconds=100.0, rate=100.0, to_rate=300.0, burst=50, every_s=25.0))
    at = scenario.requests().at_s
    assert len(at) == pytest.approx(20_200, rel=0.03)
    assert np.all(np.diff(at) >= 0)
    halves = np.histogram(at, bins=[0, 50, 100])[0]
    assert halves[1] / halves[0] == pytest.approx(250 / 150, rel=0.06)
    assert np.count_nonzero(at == 25.0) == 50


def test_costs_have_the_mean_and_the_spread_that_were_asked_for() -> None:
    drawn = replace(CALM, costs=Costs(query_ms=2.0, spread=0.5), load=Load(seconds=20.0, rate=1000.0)).requests()
    assert float(drawn.work_s.mean()) == pytest.approx(0.002, rel=0.03)
    assert float(drawn.work_s.std() / drawn.work_s.mean()) == pytest.approx(0.5, rel=0.05)


def test_everything_wrong_with_a_scenario_is_told_at_once() -> None:
    text = 'titel = "x"\nseed = 1.5\nload = 3\n[server]\ncore = 4\nmax_connections = 1\n'
    text += '[clients]\ninstances = "many"\n'
    with pytest.raises(ConfigError) as caught:
        parse(text, "mine.toml")
    problems = " ".join(caught.value.problems)
    assert len(caught.value.problems) == 6
    for words in (
        "did you mean 'title'",
        "seed = 1.5",
        "[load]",
        "did you mean 'cores'",
        "4 to 100,000",
        "'many'",
    ):
        assert words in problems


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[load", "this is not TOML"),
        ("[clients]\nmin_size = 20", "above pool_size"),
        ("[load]\nrate = 1000000\nseconds = 3600", "5,000,000 at most"),
        ("[load]\nrate = 0", "nobody asks"),
        ("[server]\nmax_connections = 4\nreserved = 4", "leaves nothing"),
    ],
)
def test_a_scenario_that_cannot_be_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"mine\.toml") as caught:
        parse(text, "mine.toml")
    assert words in str(caught.value)


def test_a_scenario_is_found_by_name_or_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(as_toml(CALM), encoding="utf-8")
    assert load(str(path)) == CALM
    with pytest.raises(ConfigError, match="did you mean 'restart'"):
        load("restrat")
    with pytest.raises(ConfigError, match="No such file"):
        load(str(tmp_path / "none.toml"))


def test_options_of_the_command_line_change_a_scenario() -> None:
    asked = changed(CALM, ["clients.instances=7", "restart.down_s=1.5", "load.rate=10"])
    assert (asked.clients.instances, asked.load.rate) == (7, 10)
    assert asked.restart == Restart(down_s=1.5)
    for word in ("instances=7", "clients.instances", "clients.instances=seven", "clients.foo=1"):
        with pytest.raises(ConfigError):
            changed(CALM, [word])


def test_costs_come_from_what_size_measured(tmp_path: Path) -> None:
    path = tmp_path / "size.json"
    fit = {"rate": 500.0, "contention": 0.2, "coherency": 0.001}
    path.write_text(json.dumps({"fit": fit, "levels": [{"connections": 16}], "statements": None}))
    costs = with_costs(CALM, path).costs
    assert (costs.query_ms, costs.wait_ms, costs.contention, costs.coherency) == (2.0, 0.0, 0.2, 0.001)
    assert (costs.law_to, costs.spread) == (16, CALM.costs.spread)
    statements = [{"calls": 3, "mean_s": 0.001}, {"calls": 1, "mean_s": 0.005}]
    path.write_text(json.dumps({"fit": fit, "levels": [{"connections": 16}], "statements": statements}))
    measured = with_costs(CALM, path)
    assert (measured.costs.query_ms, measured.server) == (2.0, CALM.server)
    assert measured.costs.spread == pytest.approx(math.sqrt((7 - 4) / 4 + 7 / 4))  # mean of squares 7
    path.write_text(json.dumps({"storm_costs": {"connect_ms": 9.5}}))
    assert with_costs(CALM, path).costs.connect_ms == 9.5
    for text in ("{}", "[]", "nonsense"):
        path.write_text(text)
        with pytest.raises(ConfigError):
            with_costs(CALM, path)


def test_a_storm_with_measured_costs_does_what_was_measured_and_no_more(tmp_path: Path) -> None:
    """The law is known up to 8 connections; there are 8 in all, and then 40."""
    path = tmp_path / "size.json"
    statements = [{"calls": 9, "mean_s": 0.00001}]
    fit = {"rate": 1000.0, "contention": 0.1, "coherency": 0.001, "ceiling": None}
    figures = {"fit": fit, "levels": [{"connections": 1}, {"connections": 8}], "statements": statements}
    path.write_text(json.dumps(figures | {"server": {"cores": 2}}))
    crowd = replace(CALM, clients=replace(CALM.clients, instances=4, pool_size=10), load=Load(1.0, 8000.0))
    few = replace(crowd, clients=replace(crowd.clients, pool_size=2))
    highest = 8000 / (1 + 0.1 * 7 + 0.001 * 8 * 7)
    for asked in (crowd, few):
        scenario = with_costs(asked, path)
        outcome = simulate(scenario, "local")
        assert outcome.rate == pytest.approx(highest, rel=0.1)
        assert (scenario.server.cores, outcome.cpu_s) == (2, None)
    fit["ceiling"] = 2000.0
    path.write_text(json.dumps(figures))
    assert simulate(with_costs(crowd, path), "local").rate == pytest.approx(2000, rel=0.15)


# -- words and pictures -----------------------------------------------------------------------------------------


def test_the_words_and_the_json_carry_the_figures() -> None:
    storm = run(replace(CALM, load=Load(seconds=1.0, rate=0.0, burst=2000)))
    lines = rows(storm)
    assert [len(line) for line in lines] == [len(HEADINGS)] * 4
    words = " ".join(explained(storm))
    assert "too_many_connections" in words
    assert "Proxy: everybody was answered" in words
    figures = as_dict(storm)
    assert json.loads(json.dumps(figures))["ways"]["proxy"]["answered"] == 2000
    assert figures["scenario"] == as_tables(storm.scenario)


def test_the_words_name_what_the_callers_waited_for() -> None:
    load = Load(seconds=2.0, rate=1000.0)
    slow = replace(CALM, costs=replace(CALM.costs, fork_ms=2.0), clients=replace(CALM.clients, timeout_s=0.5))
    words = " ".join(explained(run(replace(slow, load=load), ("none",))))
    assert "starts no more than 500 a second" in words
    assert "waited longer than the 500 ms after which a pool refuses" in words
    many = replace(CALM, clients=Clients(instances=60, pool_size=1, min_size=0), load=load)
    words = " ".join(explained(run(many, ("budget",))))
    assert "60 pools share 32 connections" in words
    assert "no more than 4 are opened at once" in words


def test_a_simulation_that_is_further_off_than_stated_says_so() -> None:
    storm = run(CALM, ("none", "local"))
    assert list(disagreements(storm, storm)) == []
    direct, local = storm.outcomes
    real = replace(storm, outcomes=(replace(direct, latency_s=direct.latency_s[::2] * 3), local))
    (sentence,) = disagreements(real, storm)
    assert sentence.startswith("No pool: beyond the stated error: ")
    assert "answers a second real" in sentence
    assert "p99" in sentence


def test_a_way_in_which_nobody_is_answered_is_shown_too(tmp_path: Path) -> None:
    scenario = replace(CALM, restart=Restart(at_s=0.0, down_s=60.0), clients=replace(CALM.clients, timeout_s=0.5))
    storm = run(scenario)
    assert all(each.percentile_s(0.5) is None for each in storm.outcomes)
    assert "nobody was answered" in " ".join(explained(storm))
    ink.save(drawing(storm, "simulated"), tmp_path / "storm.png", size=SIZE)


def test_the_picture_is_drawn_on_both_papers() -> None:
    storm = run(CALM)
    light, dark = (ink.svg(drawing(storm, "simulated"), size=SIZE, ink=each) for each in (ink.LIGHT, ink.DARK))
    assert light.startswith("<svg")
    assert light != dark


def test_percentiles_are_of_the_answered() -> None:
    outcome = simulate(CALM, "proxy")
    highest = outcome.percentile_s(1.0)
    assert highest is not None
    assert math.isclose(highest, float(outcome.latency_s.max()))
