"""What a pass found: one line a file, the survivors, and docs/mutation.md."""

from __future__ import annotations

import sys
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mutants import Mutant

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENT = Path(__file__).parent / "equivalent.toml"
DOCUMENT = ROOT / "docs" / "mutation.md"
Key = tuple[str, str, str]
"""File, function, change."""


def equivalents() -> dict[Key, str]:
    """Mutants that no test can notice, each with the reason: it computes the same."""
    entries = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8")).get("equivalent", [])
    return {(entry["file"], entry["where"], change): entry["reason"] for entry in entries for change in entry["changes"]}


@dataclass(frozen=True)
class Outcome:
    """One file: how many mutants of each kind, which are equivalent, which survived."""

    file: str
    kinds: Counter[str]
    equivalent: list[Mutant]
    survived: list[Mutant]

    @classmethod
    def of(cls, file: str, results: Sequence[tuple[Mutant, bool]], known: Mapping[Key, str]) -> Outcome:
        """From each mutant and whether it was noticed; one that is noticed is not equivalent, whatever the table says."""
        unnoticed = sorted((mutant for mutant, noticed in results if not noticed), key=lambda mutant: (mutant.line, mutant.change))
        equivalent = [mutant for mutant in unnoticed if (file, mutant.where, mutant.change) in known]
        return cls(file, Counter(mutant.kind for mutant, _ in results), equivalent, [mutant for mutant in unnoticed if mutant not in equivalent])

    @property
    def mutants(self) -> int:
        """How many there are."""
        return sum(self.kinds.values())

    @property
    def killed(self) -> int:
        """How many the tests noticed."""
        return self.mutants - len(self.equivalent) - len(self.survived)

    def line(self) -> str:
        """For a person who watches."""
        return f"{self.file:24} {self.mutants:4} mutants {self.killed:4} killed {len(self.equivalent):3} equivalent {len(self.survived):3} survived"


def print_survivors(outcome: Outcome) -> None:
    """Where a test is missing, or a condition is needless."""
    for mutant in outcome.survived:
        sys.stdout.write(f"graphs/fusions/{outcome.file}:{mutant.line} {mutant.where} [{mutant.kind}]\n    {mutant.change}\n")


def write_report(outcomes: Sequence[Outcome], known: Mapping[Key, str]) -> None:
    """docs/mutation.md, the same for the same results."""
    kinds = sorted({kind for outcome in outcomes for kind in outcome.kinds})
    total = Outcome(
        "**all**",
        sum((one.kinds for one in outcomes), Counter()),
        [m for one in outcomes for m in one.equivalent],
        [m for one in outcomes for m in one.survived],
    )
    lines = [_HEAD, f"| file | mutants | {' | '.join(kinds)} | killed | equivalent | survived |", "|---" * (len(kinds) + 5) + "|"]
    for one in [*outcomes, total]:
        counts = [one.mutants, *(one.kinds[kind] for kind in kinds), one.killed, len(one.equivalent), len(one.survived)]
        lines.append(f"| {one.file} | {' | '.join(map(str, counts))} |")
    lines += ["", "## Equivalent", "", "| file | in | change | why nothing can tell |", "|---|---|---|---|"]
    for one in outcomes:
        for mutant in one.equivalent:
            reason = known[one.file, mutant.where, mutant.change]
            lines.append(f"| {one.file} | {mutant.where} | `{_cell(mutant.change)}` | {_cell(reason)} |")
    DOCUMENT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


_HEAD = """# Mutation pass over graphs/fusions

Made by `scripts/mutate`: each condition, constant, attribute and refusal of each file is changed, one at a time, and that file's own tests are run.
*Killed*: a test fails. *Equivalent*: the changed file computes the same, with the reason below. *Survived*: a test is missing; there must be none.
"""
