"""What decides a step's result is in its key: every file that its work imports is among its rules, or is excused here with a reason."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

from artifact.step_kinds import STEPS

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("artifact", "commands", "engines", "exporter", "graphs", "validation")

WORK = {
    "export": ("commands/export.py",),
    "fuse": ("graphs/pipeline.py",),
    "calibrate": ("commands/calibrate.py",),
    "smoothing": ("commands/placement_model.py",),
    "sensitivity": ("commands/placement_model.py", "validation/scoring.py"),
    "quantize": (
        "commands/placement.py",
        *(f"graphs/quantize/{writer}.py" for writer in ("blocks", "given_islands", "int4", "int8", "int8_smoothquant")),
    ),
    "build": ("commands/build.py",),
    "validate": ("validation/parity.py",),
}
"""Step → where its work begins; what that imports is followed."""
OPTIONS = "reads options, which the step records, and calls"
REFUSES = "refuses where memory or disk is short, and decides nothing else"
NOT_SEARCHED = "forms.py rounds by it; the search of what smooths does not"
EXCUSED: Mapping[str, Mapping[str, str]] = {
    "export": {"commands/export.py": OPTIONS, "engines/preflight.py": REFUSES, "engines/step_costs.py": REFUSES},
    "calibrate": {"commands/calibrate.py": OPTIONS, "engines/preflight.py": REFUSES, "engines/step_costs.py": REFUSES},
    "smoothing": {
        **dict.fromkeys((f"graphs/quantize/{file}.py" for file in ("rounder", "weight_only", "writer")), NOT_SEARCHED),
        **dict.fromkeys((f"validation/{file}.py" for file in ("fake_quant", "rounded_once", "sensitivity")), NOT_SEARCHED),
    },
    "quantize": {"commands/calibrate.py": "the calibration that it asks for is an input"},
    "build": {"commands/build.py": OPTIONS},
}
"""Step → file that is no rule of it → why; what an excused file imports is followed only where the work begins with it."""


def runtime_imports(source: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, names) of every import that runs; those under TYPE_CHECKING do not."""
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module), tuple(alias.name for alias in node.names)
        todo += ast.iter_child_nodes(node)


def files_of(module: str, names: Iterable[str]) -> Iterator[Path]:
    """The project's files that an import runs: a module, or a package and the modules that are taken from it."""
    if module.split(".", maxsplit=1)[0] not in ROOMS:
        return
    path = ROOT.joinpath(*module.split("."))
    for one in (path, *(path / name for name in names)):
        yield from (file for file in (one.with_suffix(".py"), one / "__init__.py") if file.is_file())


def reached(begin: Iterable[str], excused: Iterable[str]) -> set[str]:
    """Files that are imported from some, and from those in turn; an excused file's imports only where it is a beginning."""
    todo, found = [ROOT / file for file in begin], set()
    stop = {ROOT / file for file in excused} - set(todo)
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        if path not in stop:
            todo += imported(path)
    return {path.relative_to(ROOT).as_posix() for path in found if has_code(path)}


@cache
def imported(path: Path) -> tuple[Path, ...]:
    return tuple(file for module, names in runtime_imports(path.read_text(encoding="utf-8")) for file in files_of(module, names))


@cache
def has_code(path: Path) -> bool:
    """Whether there is more than a docstring."""
    return len(ast.parse(path.read_text(encoding="utf-8")).body) > 1


def covered(rules: Iterable[str]) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for pattern in rules for path in ROOT.glob(pattern)}


def uncovered(step: str, rules: Iterable[str]) -> set[str]:
    excused = EXCUSED.get(step, {})
    return reached(WORK[step], excused) - covered(rules) - excused.keys()


def test_every_step_has_a_beginning() -> None:
    assert WORK.keys() == STEPS.keys()


@pytest.mark.parametrize("step", WORK)
def test_what_a_step_imports_is_in_its_key(step: str) -> None:
    assert sorted(uncovered(step, STEPS[step].rules)) == []


@pytest.mark.parametrize("step", EXCUSED)
def test_an_excuse_is_for_a_file_that_is_imported_and_no_rule(step: str) -> None:
    assert EXCUSED[step].keys() <= reached(WORK[step], EXCUSED[step]) - covered(STEPS[step].rules)


@pytest.mark.parametrize("step", STEPS)
def test_every_rule_matches_a_file(step: str) -> None:
    assert [pattern for pattern in STEPS[step].rules if not any(ROOT.glob(pattern))] == []


@pytest.mark.parametrize(
    ("step", "rule", "file"),
    [
        ("validate", "graphs/quantize/placement.py", "graphs/quantize/placement.py"),
        ("validate", "engines/plan*.py", "engines/plan_loading.py"),
        ("quantize", "validation/bootstrap.py", "validation/bootstrap.py"),
        ("build", "graphs/parts.py", "graphs/parts.py"),
    ],
)
def test_a_rule_that_is_left_out_is_found(step: str, rule: str, file: str) -> None:
    assert file in uncovered(step, [one for one in STEPS[step].rules if one != rule])


def test_imports_of_types_alone_are_not_followed() -> None:
    source = "from graphs import parts\nif TYPE_CHECKING:\n    import engines.plan\ndef f():\n    import validation.text"
    assert set(runtime_imports(source)) == {("graphs", ("parts",)), ("validation.text", ())}
