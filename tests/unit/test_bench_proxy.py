"""The proxy's benchmark counts what it says it counts: its pure parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.proxy.cells import CPU_MEAN, Cell, chosen, every_cell
from benchmarks.proxy.contestants import cenote_toml, pgbouncer_ini, release
from benchmarks.proxy.gauge import pss_kib
from benchmarks.proxy.pgbench import in_window, quantile
from benchmarks.proxy.summary import cpu_mean, geometric_mean, told
from benchmarks.rounds import Spread

from cenote.proxy.config import load_config, pool_options

LOG = b"""\
0 1 400 0 1700000000 999999
1 1 500 0 1700000001 0
0 2 600 0 1700000001 500000
1 2 700 0 1700000002 0
"""


def test_transactions_count_when_they_ended_in_the_window() -> None:
    assert in_window(LOG, 1_700_000_001.0, 1_700_000_002.0) == [500, 600]


def test_a_quantile_is_a_latency_that_was_measured() -> None:
    ordered = list(range(1, 101))
    assert (quantile(ordered, 0.5), quantile(ordered, 0.99), quantile([7], 0.99)) == (51, 100, 7)


def test_memory_is_the_proportional_set_size() -> None:
    assert pss_kib("55d0-7ffd ---p 00000000 00:00 0 [rollup]\nRss:   90 kB\nPss:   42 kB\nPss_Anon: 7 kB\n") == 42
    with pytest.raises(ValueError, match="no Pss"):
        pss_kib("Rss: 90 kB\n")


def test_every_cell_can_be_asked_for_by_its_name() -> None:
    for cell in every_cell():
        assert chosen([cell.name]) == [cell]


def test_the_budget_is_twelve_cells() -> None:
    cells = chosen(["budget"])
    assert len(cells) == 12
    assert {cell.clients for cell in cells} == {8, 64}


def test_patterns_name_no_cell_twice_and_sizes_are_free() -> None:
    assert [cell.name for cell in chosen(["simple/8*", "simple/8"])] == ["simple/8", "simple/8/tls"]
    assert chosen(["idle/70/tls"]) == [Cell("idle", 70, tls=True)]


@pytest.mark.parametrize("name", ["nonsense", "simple/0", "simple/8/ssl", "simple", "simple/x"])
def test_a_name_that_fits_no_cell_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no cell is called"):
        chosen([name])


def test_prepared_statements_in_transaction_mode_begin_with_pgbouncer_1_21() -> None:
    assert release("1.18.0") < (1, 21) <= release("1.21.0") < release("1.24.1-dev")


def test_the_mean_is_geometric_and_taken_round_by_round() -> None:
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    found = {
        Cell("simple", 8): {"PgBouncer": [{"CPU": 1e-6}, {"CPU": 2e-6}], "Cenote": [{"CPU": 2e-6}, {"CPU": 4e-6}]},
        Cell("simple", 64): {
            "PgBouncer": [{"CPU": 4e-6}, {"CPU": 4e-6}],
            "Cenote": [{"CPU": 2e-6}, {"CPU": 2e-6}],
        },
        Cell("simple", 512): {"PgBouncer": [{"CPU": 9.0}, {"CPU": 9.0}], "Cenote": [{"CPU": 1.0}, {"CPU": 1.0}]},
        Cell("prepared", 8): {"Cenote": [{"CPU": 1e-6}, {"CPU": 1e-6}]},
    }
    theirs, ours = cpu_mean(found, ["PgBouncer", "Cenote"], "PgBouncer")
    assert theirs.ratio is None
    assert ours.ratio is not None
    assert ours.ratio.median == pytest.approx(1.0)
    assert (ours.bound, ours.verdict) == (CPU_MEAN, "met")
    assert ours.group == "CPU, geometric mean of 2 of the 12 cells of the budget"


@pytest.mark.parametrize(
    ("figure", "verdict"),
    [
        (Spread(1.0, 0.9, 1.1), "met"),
        (Spread(1.0, 0.9, 1.3), "met (the spread crosses it)"),
        (Spread(1.3, 1.2, 1.4), "missed (the spread crosses it)"),
        (Spread(1.3, 1.25, 1.4), "missed"),
    ],
)
def test_a_doubt_is_told(figure: Spread, verdict: str) -> None:
    assert told(figure, 1.2) == verdict


def test_both_contestants_are_given_the_same(tmp_path: Path) -> None:
    certificate = Path(__file__)
    shared = {"port": 6000, "server_port": 5000, "database": "app", "user": "me", "password": "secret"}
    paths = {"certificate": certificate, "key": certificate}
    file = tmp_path / "cenote.toml"
    verifier = "SCRAM-SHA-256$4096:c2FsdA==$" + "A" * 43 + "=:" + "A" * 43 + "="
    file.write_text(cenote_toml(**shared, **paths, verifier=verifier).replace("tls_", "#"))  # type: ignore[arg-type]
    config = load_config(file)
    options = pool_options(config, "app", "me")
    ini = pgbouncer_ini(**shared, **paths, users=tmp_path, prepared=False)  # type: ignore[arg-type]
    theirs = dict(line.split(" = ") for line in ini.splitlines() if " = " in line)
    assert (options.mode, options.max_size) == (theirs["pool_mode"], int(theirs["default_pool_size"]))
    assert config.listen.max_clients == int(theirs["max_client_conn"])
    assert (config.auth, config.listen.port) == (theirs["auth_type"], int(theirs["listen_port"]))
    assert "max_prepared_statements" not in theirs
