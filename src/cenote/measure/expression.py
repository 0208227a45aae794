"""The expressions of pgbench's `\\set`, as far as they are numbers: arithmetic, variables, random functions.

They mean what pgbench's documentation says of them: whole numbers stay whole, division truncates towards zero.
What is not here (strings, CASE, bit operators, hashes) is refused by name.
"""

import math
import operator
import random
import re
from collections.abc import Callable, Container
from typing import NoReturn

Variables = dict[str, int | float]
Expression = Callable[[Variables, random.Random], int | float]

_TOKEN = re.compile(r"\s*(?:(\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+|\d+)|:([A-Za-z_]\w*)|([A-Za-z_]\w*)|(\S))")


class BadExpression(ValueError):
    """What is wrong, in words; the caller knows the line."""


def parse_expression(text: str, known: Container[str]) -> Expression:
    """An expression that can be evaluated again and again.

    :param known: the variables that have a value when it is evaluated
    :raises BadExpression: anything that is not understood
    """
    return _Parser(text, known).whole()


class _Parser:
    """Recursive descent: sum, product, sign, value."""

    def __init__(self, text: str, known: Container[str]) -> None:
        self._text = text
        self._known = known
        self._tokens = [found for found in _TOKEN.finditer(text) if found.lastindex]
        self._at = 0

    def whole(self) -> Expression:
        if not self._tokens:
            raise BadExpression("a value is missing")
        value = self._sum()
        if self._at < len(self._tokens):
            self._refuse()
        return value

    def _refuse(self) -> NoReturn:
        if self._at >= len(self._tokens):
            raise BadExpression(f"{self._text.strip()!r} ends too early")
        raise BadExpression(f"{self._tokens[self._at][0].strip()!r} in {self._text.strip()!r} is not understood")

    def _take(self, symbols: str) -> str:
        """The next token if it is one of these symbols, else ""."""
        if self._at < len(self._tokens):
            symbol = self._tokens[self._at][4]
            if symbol and symbol in symbols:
                self._at += 1
                return str(symbol)
        return ""

    def _sum(self) -> Expression:
        left = self._product()
        while symbol := self._take("+-"):
            left = _both(operator.add if symbol == "+" else operator.sub, left, self._product())
        return left

    def _product(self) -> Expression:
        left = self._sign()
        while symbol := self._take("*/%"):
            what = {"*": operator.mul, "/": _divide, "%": _modulo}[symbol]
            left = _both(what, left, self._sign())
        return left

    def _sign(self) -> Expression:
        if self._take("-"):
            value = self._sign()
            return lambda variables, chance: -value(variables, chance)
        if self._take("+"):
            return self._sign()
        return self._value()

    def _value(self) -> Expression:
        if self._take("("):
            value = self._sum()
            if not self._take(")"):
                self._refuse()
            return value
        if self._at >= len(self._tokens):
            self._refuse()
        number, variable, word, _ = self._tokens[self._at].groups()
        if number is not None:
            self._at += 1
            constant: int | float = int(number) if number.isdigit() else float(number)
            return lambda variables, chance: constant
        if variable is not None:
            if variable not in self._known:
                raise BadExpression(f":{variable} has no value here")
            self._at += 1
            return lambda variables, chance: variables[variable]
        if word is None:
            self._refuse()
        return self._call(word)

    def _call(self, word: str) -> Expression:
        least, most, function = _FUNCTIONS.get(word, (0, 0, None))
        if function is None:
            raise BadExpression(f"{word!r} is not understood; known are {', '.join(sorted(_FUNCTIONS))}")
        self._at += 1
        arguments: list[Expression] = []
        if not self._take("("):
            raise BadExpression(f"{word} needs its arguments in parentheses")
        while not self._take(")"):
            if arguments and not self._take(","):
                self._refuse()
            arguments.append(self._sum())
        if not least <= len(arguments) <= most:
            raise BadExpression(f"{word} takes {least} arguments, not {len(arguments)}")
        return lambda variables, chance: function(chance, *(value(variables, chance) for value in arguments))


def _both(
    what: Callable[[int | float, int | float], int | float], left: Expression, right: Expression
) -> Expression:
    return lambda variables, chance: what(left(variables, chance), right(variables, chance))


def _divide(left: float, right: float) -> int | float:
    if right == 0:
        raise BadExpression("division by zero")
    if isinstance(left, int) and isinstance(right, int):
        quotient = abs(left) // abs(right)
        return quotient if (left < 0) == (right < 0) else -quotient
    return left / right


def _modulo(left: float, right: float) -> int | float:
    if not (isinstance(left, int) and isinstance(right, int)):
        raise BadExpression("% is for whole numbers")
    return left - right * int(_divide(left, right))


def _bounds(low: float, high: float) -> tuple[int, int]:
    first, last = int(low), int(high)
    if first > last:
        raise BadExpression(f"random between {first} and {last}: the range is empty")
    return first, last


def _uniform(chance: random.Random, low: float, high: float) -> int:
    return chance.randint(*_bounds(low, high))


def _gaussian(chance: random.Random, low: float, high: float, parameter: float) -> int:
    """A bell over the range, cut off `parameter` standard deviations from its middle."""
    if parameter < 2:
        raise BadExpression(f"random_gaussian with {parameter:g}: 2 or more")
    first, last = _bounds(low, high)
    while not -parameter <= (deviation := chance.gauss(0.0, 1.0)) < parameter:
        pass
    return first + int((last - first + 1) * (deviation + parameter) / (2 * parameter))


def _exponential(chance: random.Random, low: float, high: float, parameter: float) -> int:
    """Falling from the low end, cut off at the high end."""
    if parameter <= 0:
        raise BadExpression(f"random_exponential with {parameter:g}: more than 0")
    first, last = _bounds(low, high)
    cut = math.exp(-parameter)
    share = -math.log(cut + (1 - cut) * (1.0 - chance.random())) / parameter
    return min(last, first + int((last - first + 1) * share))


def _zipfian(chance: random.Random, low: float, high: float, parameter: float) -> int:
    """Rejection, after Devroye, "Non-Uniform Random Variate Generation", X.6.1."""
    if not 1.001 <= parameter <= 1000:
        raise BadExpression(f"random_zipfian with {parameter:g}: 1.001 to 1000")
    first, last = _bounds(low, high)
    power = parameter - 1
    scale = 2.0**power
    while True:
        u, v = 1.0 - chance.random(), chance.random()
        if -math.log(u) / power >= math.log(last - first + 2):
            continue  # beyond the range, and maybe beyond what a float holds
        rank = int(u ** (-1 / power))
        ratio = (1 + 1 / rank) ** power
        if v * rank * (ratio - 1) / (scale - 1) <= ratio / scale:
            return first - 1 + rank


_FUNCTIONS: dict[str, tuple[int, int, Callable[..., int | float]]] = {
    "random": (2, 2, _uniform),
    "random_gaussian": (3, 3, _gaussian),
    "random_exponential": (3, 3, _exponential),
    "random_zipfian": (3, 3, _zipfian),
    "abs": (1, 1, lambda _, value: abs(value)),
    "int": (1, 1, lambda _, value: int(value)),
    "double": (1, 1, lambda _, value: float(value)),
    "greatest": (1, 99, lambda _, *values: max(values)),
    "least": (1, 99, lambda _, *values: min(values)),
    "mod": (2, 2, lambda _, left, right: _modulo(left, right)),
}
