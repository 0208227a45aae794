"""The run against the performance budget: what no single cell can tell.

Every figure is made of the rounds: the geometric mean of each round first, then the median of those.
"""

import math
from collections.abc import Mapping, Sequence

from benchmarks.proxy.cells import CPU_MEAN, IDLE_KIB, Cell, every_cell
from benchmarks.proxy.contestants import CENOTE, PGBOUNCER
from benchmarks.rounds import Row, Sample, Spread

Found = Mapping[Cell, Mapping[str, Sequence[Sample]]]
"""By cell and contestant, the rounds."""


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def cpu_mean(found: Found, contestants: Sequence[str], reference: str) -> list[Row]:
    """The geometric mean of the CPU of the promised cells that all contestants went through."""
    cells = [cell for cell in found if cell.in_budget and all(name in found[cell] for name in contestants)]
    if not cells or len(contestants) < 2:
        return []
    rounds = min(len(found[cell][name]) for cell in cells for name in contestants)

    def means(name: str) -> list[float]:
        return [geometric_mean([found[cell][name][number]["CPU"] for cell in cells]) for number in range(rounds)]

    whole = sum(cell.in_budget for cell in every_cell())
    theirs = means(reference)
    rows = []
    for name in contestants:
        mine = means(name)
        ratio = verdict = bound = None
        if name != reference:
            ratio = Spread.of([one / other for one, other in zip(mine, theirs, strict=True)])
            if (name, reference) == (CENOTE, PGBOUNCER):
                bound = CPU_MEAN
                verdict = told(ratio, bound)
        rows.append(
            Row(
                "proxy",
                f"CPU, geometric mean of {len(cells)} of the {whole} cells of the budget",
                "CPU",
                "us per transaction",
                name,
                rounds,
                Spread.of([value * 1e6 for value in mine]),
                reference,
                ratio,
                bound,
                verdict or "",
            )
        )
    return rows


def told(figure: Spread, bound: float) -> str:
    """Met or missed by the median, and whether the quartiles leave a doubt."""
    word, sure = ("met", figure.high <= bound) if figure.median <= bound else ("missed", figure.low > bound)
    return word if sure else f"{word} (the spread crosses it)"


def idle_memory(found: Found, contestant: str) -> list[Row]:
    """The memory of an idle client against the budget, which is in KiB: no ratio."""
    rows = []
    for cell, samples in found.items():
        if cell.kind != "idle" or contestant not in samples:
            continue
        memory = Spread.of([sample["memory"] for sample in samples[contestant]])
        bound = IDLE_KIB[cell.tls]
        # The budget is an amount and no ratio, so it stands in the title.
        title = f"memory of an idle client, {cell.name}, at most {bound:g} KiB: {told(memory, bound)}"
        rounds = len(samples[contestant])
        rows.append(
            Row("proxy", title, "memory", "KiB per client", contestant, rounds, memory, contestant, None, None, "")
        )
    return rows
