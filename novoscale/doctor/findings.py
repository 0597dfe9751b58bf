"""What is found: sentences, in the order of how much they matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from novoscale.doctor.case import Case

ORDER = ("wrong", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One sentence about one key, or one line of the script.

    Attributes:
        severity: "wrong": training stops, or goes on with another optimizer than the one asked for;
            "warning": an option that does not do what it says; "note": worth knowing.
        where: path of the key, or the script and its line.
        text: the rest of the sentence.
        rule: the function that found it.
    """

    severity: str
    where: str
    text: str
    rule: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


Rule = Callable[[Case], Iterator[Finding]]


def find(case: Case, rules: tuple[Rule, ...]) -> list[Finding]:
    """What the rules find, the worst first."""
    found = [Finding(f.severity, f.where, f.text, rule.__name__) for rule in rules for f in rule(case)]
    return sorted(found, key=lambda finding: ORDER.index(finding.severity))


def wrong(where: str, text: str) -> Finding:
    """Training stops, or goes on with another optimizer than the one asked for."""
    return Finding("wrong", where, text)


def warning(where: str, text: str) -> Finding:
    """An option that does not do what it says."""
    return Finding("warning", where, text)


def note(where: str, text: str) -> Finding:
    """Worth knowing."""
    return Finding("note", where, text)
