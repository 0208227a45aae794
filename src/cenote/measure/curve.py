"""The curve of throughput against connections: the universal scalability law, fitted, with an error band.

Gunther's law says X(n) = r n / (1 + s (n - 1) + k n (n - 1)): r is the rate of one connection alone, s the share
of the work that is done one at a time (contention), k the price of agreeing with each other (coherency), which
makes bigger slower. Some servers have a hard limit instead (tokens, a device with so many queues), at which the
curve bends at once: where the measurements say so, the law is cut off at a ceiling. Pure: figures in, figures out.

Source: N. J. Gunther, "Guerrilla Capacity Planning", 2007, chapters 4 to 6.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit, nnls

KNEE_SHARE = 0.95
_BEYOND = 1.25  # measured so far beyond it, or a knee is only the end: 95 % of a straight line is near its end too
_CONFIDENCE = 0.90
_DRAWS = 120
_SEED = 95

Points = Mapping[int, Sequence[float]]
"""For each number of connections the throughput of each round, in transactions per second."""


@dataclass(frozen=True, slots=True)
class Law:
    """One curve.

    rate: transactions per second of one connection
    contention, coherency: s and k of the law
    ceiling: what the throughput never exceeds; None: nothing but the law bounds it
    """

    rate: float
    contention: float
    coherency: float
    ceiling: float | None = None

    def at(self, connections: float) -> float:
        """Throughput with that many connections."""
        n = connections
        law = self.rate * n / (1 + self.contention * (n - 1) + self.coherency * n * (n - 1))
        return law if self.ceiling is None else min(law, self.ceiling)

    def best(self, most: int) -> tuple[int, float]:
        """Where the throughput is highest up to `most` connections, and how high."""
        return max(((n, self.at(n)) for n in range(1, most + 1)), key=lambda pair: (pair[1], -pair[0]))

    def knee(self, most: int) -> int:
        """The smallest number of connections whose throughput reaches 95 % of the highest up to `most`.

        Only what was measured counts: a law may promise more far beyond it, and nobody has seen that.
        """
        _, highest = self.best(most)
        return next(n for n in range(1, most + 1) if self.at(n) >= KNEE_SHARE * highest)


@dataclass(frozen=True, slots=True)
class Fit:
    """The law that fits, and how sure that is.

    knee, knee_low, knee_high: connections; the interval holds nine of ten repetitions of the measurement
    measured_knee: the smallest measured level that reaches 95 % of the highest measured median, without any law
    error: root of the mean square of the law's relative deviations from the levels' medians
    band: connections -> (low, high) throughput, the same nine of ten
    most: the highest level measured
    """

    law: Law
    knee: int
    knee_low: int
    knee_high: int
    measured_knee: int
    error: float
    band: Mapping[int, tuple[float, float]]
    most: int

    @property
    def saturated(self) -> bool:
        """Whether levels well above the knee were measured, so that there is a knee and not only an end."""
        return _is_seen(self.knee_high, self.most)


def _is_seen(knee: int, most: int) -> bool:
    return knee * _BEYOND <= most


def fit(points: Points) -> Fit:
    """Fit the law to at least three levels.

    The error band is a bootstrap: the rounds of each level are drawn again, with replacement, and fitted again.

    :raises ValueError: fewer than three levels, or a level without throughput
    """
    levels = sorted(points)
    if len(levels) < 3 or any(not points[n] or min(points[n]) <= 0 for n in levels):
        raise ValueError("at least three levels with throughput are needed")
    medians = np.array([np.median(points[n]) for n in levels])
    n = np.array(levels, dtype=float)
    law = _chosen(n, medians)
    most = levels[-1]
    again = [_like(law, n, drawn) for drawn in _drawn(points, levels)]
    knees = np.array([other.knee(most) for other in again])
    tail = (1 - _CONFIDENCE) / 2
    low, high = (int(v) for v in np.quantile(knees, [tail, 1 - tail], method="nearest"))
    knee = law.knee(most)
    curves = np.array([[other.at(count) for count in range(1, most + 1)] for other in again])
    lows, highs = np.quantile(curves, [tail, 1 - tail], axis=0)
    band = {count: (float(lows[count - 1]), float(highs[count - 1])) for count in range(1, most + 1)}
    return Fit(
        law=law,
        knee=knee,
        knee_low=min(low, knee),
        knee_high=max(high, knee),
        measured_knee=next(
            count for count, x in zip(levels, medians, strict=True) if x >= KNEE_SHARE * medians.max()
        ),
        error=float(np.sqrt(np.mean(_deviations(law, n, medians) ** 2))),
        band=band,
        most=most,
    )


def _drawn(points: Points, levels: Sequence[int]) -> list[Any]:
    chance = np.random.default_rng(_SEED)
    return [
        np.array([np.mean(chance.choice(np.asarray(points[n]), len(points[n]))) for n in levels])
        for _ in range(_DRAWS)
    ]


def _chosen(n: Any, x: Any) -> Law:
    """The plain law, unless a ceiling explains clearly more than one more number is worth.

    At the last level alone it would take up nothing but that level's noise.
    """
    plain = _plain(n, x)
    if len(n) < 5:
        return plain
    capped = _capped(n, x, _bends(n, x, plain))
    bits = len(n) * np.log(_loss(plain, n, x) / _loss(capped, n, x))
    # BIC asks for log(len(n)); three times that, because the ceiling's bend can follow noise.
    most = int(n[-1])
    return capped if bits > 3 * np.log(len(n)) and _is_seen(capped.knee(most), most) else plain


def _like(law: Law, n: Any, x: Any) -> Law:
    """The same kind of curve, fitted to other figures."""
    return _plain(n, x) if law.ceiling is None else _capped(n, x, [law])


def _usl(n: Any, rate: float, contention: float, coherency: float) -> Any:
    return rate * n / (1 + contention * (n - 1) + coherency * n * (n - 1))


def _capped_usl(n: Any, rate: float, contention: float, coherency: float, ceiling: float) -> Any:
    return np.minimum(_usl(n, rate, contention, coherency), ceiling)


def _plain(n: Any, x: Any) -> Law:
    # n/X is linear in 1/r, s/r and k/r: that finds where to begin, the fit itself is of X with relative errors.
    terms = np.column_stack([np.ones_like(n), n - 1, n * (n - 1)])
    linear, _ = nnls(terms / (n / x)[:, None], np.ones_like(n))
    rate = 1 / linear[0] if linear[0] > 0 else float(np.max(x / n))
    start = [rate, linear[1] * rate, linear[2] * rate]
    return Law(*_fitted(_usl, n, x, start, ([0, 0, 0], [4 * float(np.max(x / n)), 1, 1])))


def _capped(n: Any, x: Any, starts: Sequence[Law]) -> Law:
    """The best of several starts: with a bend, the loss has more than one valley."""
    highest, slope = float(np.max(x)), float(np.max(x / n))
    bounds = ([0, 0, 0, 0.5 * highest], [4 * slope, 1, 1, 1.1 * highest])
    found = []
    for start in starts:
        values = [start.rate, start.contention, start.coherency, start.ceiling or highest]
        found.append(Law(*_fitted(_capped_usl, n, x, values, bounds)))
    return min(found, key=lambda law: _loss(law, n, x))


def _bends(n: Any, x: Any, plain: Law) -> list[Law]:
    """Where a search for a ceiling begins: the law of what is below it, and the ceiling."""
    starts = []
    for ceiling in (np.median(x), np.quantile(x, 0.75), 0.98 * np.max(x)):
        below = x < 0.9 * ceiling
        law = _plain(n[below], x[below]) if np.count_nonzero(below) >= 2 else plain
        starts.append(Law(law.rate, law.contention, law.coherency, float(ceiling)))
    return starts


def _fitted(law: Any, n: Any, x: Any, start: list[float], bounds: tuple[list[float], list[float]]) -> list[float]:
    start = [float(np.clip(value, low, high)) for value, low, high in zip(start, *bounds, strict=True)]
    scale = [max(abs(value), 1e-3) for value in start]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizeWarning)  # of the covariance, which is not used
        try:
            found = curve_fit(law, n, x, p0=start, sigma=x, bounds=bounds, x_scale=scale, max_nfev=400)[0]
        except RuntimeError:  # no convergence: where it began is a fit too
            return start
    return [float(value) for value in found]


def _deviations(law: Law, n: Any, x: Any) -> Any:
    return np.array([law.at(int(count)) for count in n]) / x - 1


def _loss(law: Law, n: Any, x: Any) -> float:
    # Nothing is measured to better than a thousandth: a perfect fit is no reason for infinite certainty.
    return float(np.sum(_deviations(law, n, x) ** 2) + len(n) * 1e-6)
