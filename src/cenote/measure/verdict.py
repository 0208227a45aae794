"""A finding of the doctor: a limit under its name, its number, what follows, what to do."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from cenote.measure.doctor_facts import Facts

Figure = float | int | str | bool | None


class Severity(IntEnum):
    """How bad, in ascending order. What is not known counts as not bad, and is always said."""

    OK = 0
    NOT_KNOWN = 1
    NOTE = 2
    WARNING = 3
    CRITICAL = 4

    @property
    def word(self) -> str:
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a rule says.

    number: the limit and what stands against it, in a few words; of NOT_KNOWN: why
    consequence, remedy: sentences; empty only where all is well
    figures: the same for programs; seconds and bytes by the ends of their names
    """

    severity: Severity
    number: str
    consequence: str = ""
    remedy: str = ""
    figures: dict[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict under the name of its rule, which is also its anchor in docs/doctor.md."""

    name: str
    verdict: Verdict


Rule = Callable[[Facts], Verdict]


def ok(number: str, **figures: Figure) -> Verdict:
    return Verdict(Severity.OK, number, figures=figures)


def not_known(why: str, remedy: str = "", **figures: Figure) -> Verdict:
    return Verdict(Severity.NOT_KNOWN, why, remedy=remedy, figures=figures)


def note(number: str, consequence: str, remedy: str, **figures: Figure) -> Verdict:
    return Verdict(Severity.NOTE, number, consequence, remedy, figures)


def warning(number: str, consequence: str, remedy: str, **figures: Figure) -> Verdict:
    return Verdict(Severity.WARNING, number, consequence, remedy, figures)


def critical(number: str, consequence: str, remedy: str, **figures: Figure) -> Verdict:
    return Verdict(Severity.CRITICAL, number, consequence, remedy, figures)


def graded(severity: Severity, number: str, consequence: str, remedy: str, figures: dict[str, Figure]) -> Verdict:
    """A verdict of a severity that a threshold decided; one that is well needs no consequence."""
    if severity is Severity.OK:
        return Verdict(severity, number, figures=figures)
    return Verdict(severity, number, consequence, remedy, figures)
