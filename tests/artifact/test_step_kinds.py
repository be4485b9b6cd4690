"""artifact/step_kinds.py: what decides a step's result is among its rules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from artifact.step_kinds import STEPS

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("artifact", "commands", "engines", "exporter", "graphs", "validation")


def imported(module: Path) -> Iterator[Path]:
    """The project's files that a file imports, those inside functions too."""
    for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] in ROOMS:
            path = Path(node.module.replace(".", "/"))
            names = (path.with_suffix(".py"), path / "__init__.py", *(path / f"{alias.name}.py" for alias in node.names))
            yield from (name for name in names if (ROOT / name).is_file())


def reached(*roots: str) -> set[Path]:
    found, waiting = set[Path](), [Path(root) for root in roots]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += imported(module)
    return found


@pytest.mark.parametrize(
    ("step", "roots"),
    [
        ("build", ("engines/build.py", "commands/part_graphs.py")),
        ("fuse", ("graphs/pipeline.py", "engines/one_position.py")),
        ("quantize", ("graphs/quantize/blocks.py", "engines/one_position.py")),
    ],
)
def test_every_file_that_a_step_runs_is_among_its_rules(step: str, roots: tuple[str, ...]) -> None:
    files = {file.as_posix() for file in reached(*roots) if file.name != "__init__.py"}
    assert len(files) > 10
    assert sorted(file for file in files if not any(fnmatch(file, rule.replace("**/", "*")) for rule in STEPS[step].rules)) == []
