"""Reading the report that ``--baseline`` names: a parity.json of the present schema, whole, before anything is measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifact.errors import ValidationError
from artifact.hashing import sha256_of
from validation.baseline import compare, require_comparable
from validation.render import schema

Report = dict[str, Any]
NEEDED = ("created", "model", "texts", "stages", "not_run", "engines", "tolerances", "versions", "machine")
"""Keys that a comparison reads."""


@dataclass(frozen=True)
class Baseline:
    """An older report, and which file it is."""

    file: str
    sha256: str
    report: Mapping[str, Any]

    def require_comparable(self, part: Mapping[str, Any]) -> None:
        """As ``baseline.require_comparable``, of what is known of a report so far."""
        require_comparable(part, self.report)

    def judge(self, report: Report) -> Report:
        """The comparison of a report with this one."""
        return {"file": self.file, "sha256": self.sha256, "created": self.report["created"], **compare(report, self.report)}


def read_baseline(path: Path) -> Baseline:
    """Read a report.

    Raises:
        ValidationError: no such file, no parity report, one of an older or newer schema, or one that is not whole.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValidationError(f"the baseline {path} can't be read: {error}", hint="--baseline FILE takes the parity.json of an older run") from error
    version = report.get("schema") if isinstance(report, dict) else None
    if not isinstance(version, int):
        raise ValidationError(f"{path} is not a parity report: it has no schema number", hint="--baseline FILE takes the parity.json of an older run")
    if version != schema.VERSION:
        older = version < schema.VERSION
        hint = "validate what it is of again with this version, and keep that report" if older else "use the version that wrote it, or a newer one"
        raise ValidationError(f"{path} has schema {version}, {'older' if older else 'newer'} than this version's {schema.VERSION}", hint=hint)
    if missing := [key for key in NEEDED if key not in report]:
        raise ValidationError(f"{path} is not a whole report: it lacks {', '.join(missing)}", hint="validate again")
    return Baseline(path.name, sha256_of(path), report)
