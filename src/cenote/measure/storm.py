"""A storm of requests, four ways side by side: no pool, local pools, local pools under a budget, one proxy.

The requests are drawn once and every way gets the same ones. Simulated here; `measure/storm_real.py` does the same
to a real server. It returns figures and prints nothing.
"""

import json
import math
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cenote.errors import ConfigError
from cenote.measure.outcome import WAYS, Outcome
from cenote.measure.scenario import Scenario, parse
from cenote.measure.simulation import simulate

_MOST_SPREAD = 5.0  # that a scenario may have


@dataclass(frozen=True, slots=True)
class Storm:
    """What became of the requests, each way.

    wall_s: what each way took to simulate, or to run
    """

    scenario: Scenario
    outcomes: tuple[Outcome, ...]
    wall_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Moment:
    """Progress of one way."""

    way: str
    ended: int
    requests: int


def run(scenario: Scenario, ways: Sequence[str] = WAYS, tell: Callable[[Moment], None] = lambda _: None) -> Storm:
    """Simulate each of these ways."""
    requests = scenario.requests()
    outcomes, walls = [], []
    for way in ways:
        began = time.perf_counter()

        def progress(ended: int, way: str = way) -> None:
            tell(Moment(way, ended, len(requests.at_s)))

        progress(0)
        outcomes.append(simulate(scenario, way, requests, progress))
        walls.append(time.perf_counter() - began)
    return Storm(scenario, tuple(outcomes), tuple(walls))


def changed(scenario: Scenario, words: Sequence[str]) -> Scenario:
    """The scenario with `table.option=value` of the command line in it.

    :raises ConfigError: what is not understood, or does not fit
    """
    tables: dict[str, Any] = {}
    problems = []
    for word in words:
        name, equals, value = word.partition("=")
        table, dot, option = name.strip().partition(".")
        try:
            if not (equals and dot):
                raise tomllib.TOMLDecodeError
            tables.setdefault(table, {})[option] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            problems.append(f"set = {word!r}: must be table.option=value, such as clients.instances=50")
    if problems:
        raise ConfigError(problems)
    given = as_tables(scenario)
    for table, options in tables.items():
        given[table] = {**given.get(table, {}), **options}
    return parse(_toml(given), scenario.title)


def as_tables(scenario: Scenario) -> dict[str, Any]:
    """The scenario as its file would have it, with every default."""
    given: dict[str, Any] = {}
    for name in Scenario.__dataclass_fields__:
        value = getattr(scenario, name)
        if isinstance(value, (str, int)):
            given[name] = value
        elif value is not None:
            given[name] = {option: getattr(value, option) for option in value.__dataclass_fields__}
    return given


def as_toml(scenario: Scenario) -> str:
    """The scenario as a file, with every default."""
    return _toml(as_tables(scenario))


def _toml(given: Mapping[str, Any]) -> str:
    """JSON's texts and numbers are TOML's too."""
    words = [f"{name} = {json.dumps(value)}" for name, value in given.items() if not isinstance(value, dict)]
    for name, table in given.items():
        if isinstance(table, dict):
            words.append(f"[{name}]")
            words += [f"{option} = {json.dumps(value)}" for option, value in table.items()]
    return "\n".join(words)


def with_costs(scenario: Scenario, path: Path) -> Scenario:
    """The scenario with measured costs: the JSON of `cenote size`, or of `cenote cost` (its "storm_costs").

    Of `cenote size` the law is taken, in whose unit, the time a transaction took alone, a query's time has to be:
    what pg_stat_statements says is execution alone and of other queries too, so of it only how unlike they are.

    :raises ConfigError: it cannot be read, or is neither
    """
    from cenote.measure.curve import Law  # which needs scipy

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if "storm_costs" in found:
            given = {name: float(value) for name, value in found["storm_costs"].items()}
            return changed(scenario, [f"costs.{name}={value}" for name, value in given.items()])
        fit = found["fit"]
        law = Law(*(float(fit[name]) for name in ("rate", "contention", "coherency")))
        most = max(level["connections"] for level in found["levels"])
        if fit.get("ceiling"):  # where the curve bends, the law ends
            most = min(range(1, most + 1), key=lambda n: abs(law.at(n) - fit["ceiling"]))
        costs = replace(
            scenario.costs,
            query_ms=1e3 / law.rate,
            wait_ms=0.0,
            spread=_spread(scenario.costs.spread, found.get("statements") or []),
            contention=law.contention,
            coherency=law.coherency,
            law_to=most,
        )
        cores = found.get("server", {}).get("cores") or scenario.server.cores
        return replace(scenario, costs=costs, server=replace(scenario.server, cores=cores))
    except OSError as error:
        raise ConfigError([f"costs = {str(path)!r}: {error.strerror}"]) from None
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            [f"costs = {str(path)!r}: this is not what cenote size --json or cenote cost --json writes"]
        ) from None


def _spread(each: float, statements: Sequence[Mapping[str, Any]]) -> float:
    """The spread of all queries, where each kind has a mean of its own and spreads about it by `each`: the law of
    total variance."""
    if not statements:
        return each
    calls = sum(kind["calls"] for kind in statements)
    mean_s = sum(kind["calls"] * kind["mean_s"] for kind in statements) / calls
    squares = sum(kind["calls"] * kind["mean_s"] ** 2 for kind in statements) / calls / mean_s**2
    return min(_MOST_SPREAD, math.sqrt(squares - 1 + squares * each**2))
