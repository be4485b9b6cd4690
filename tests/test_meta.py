"""Promises about the repository itself: sizes, docstrings, test tiers, packaging, scripts and the README's commands."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated

import pytest
import typer
import typer.core
import typer.main
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("artifact", "commands", "exporter", "graphs", "engines", "validation")
MODULES = sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))
FUSIONS = [path for path in MODULES if path.parent == Path("graphs/fusions") and not path.name.startswith("_")]
SCRIPTS = [*sorted((ROOT / "scripts").iterdir()), ROOT / ".ci" / "run"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 250, 45
TIERS = [marker.split(":")[0] for marker in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]]


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def line_count(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, its docstring and decorators left out."""
    first = function.body[0]
    has_docstring = ast.get_docstring(function) is not None
    docstring_lines = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring_lines


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_module_has_a_docstring_and_stays_small(path: Path) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert ast.get_docstring(tree), f"{path} has no docstring"
    assert len(source.splitlines()) <= MAX_FILE_LINES
    assert [f"{path}:{f.lineno} {f.name}: {line_count(f)} lines" for f in functions(tree) if line_count(f) > MAX_FUNCTION_LINES] == []


def test_line_count_leaves_out_the_docstring() -> None:
    (function,) = functions(ast.parse('@d\ndef f(a):\n    """One.\n\n    Two.\n    """\n    b = a\n    return b\n'))
    assert line_count(function) == 3


@pytest.mark.parametrize("path", FUSIONS, ids=str)
def test_fusion_has_a_test_file(path: Path) -> None:
    assert (ROOT / "tests" / path.parent / f"test_{path.name}").is_file()


def test_tests_have_no_packages() -> None:
    """A tests/graphs/__init__.py would shadow the room."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("tier", TIERS)
def test_tier_is_not_empty(tier: str) -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    marked = any(re.search(rf"pytest\.mark\.{tier}\b", source) for source in sources)
    assert marked, f"no test is marked {tier}"


def test_every_package_is_declared() -> None:
    found = {".".join(path.parent.parts) for path in MODULES}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_data_file_is_declared() -> None:
    declared = PYPROJECT["tool"]["setuptools"]["package-data"]
    patterns = [f"{package.replace('.', '/')}/{pattern}" for package, globs in declared.items() for pattern in globs]
    files = [path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file()]
    data = [str(path) for path in files if path.suffix != ".py" and "__pycache__" not in path.parts]
    assert [path for path in data if not any(fnmatch(path, pattern) for pattern in patterns)] == []
    assert [pattern for pattern in patterns if not any(fnmatch(path, pattern) for path in data)] == []


def pinned() -> dict[str, str]:
    """Package name (lower case, dashes) → version of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    project = PYPROJECT["project"]
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name != "tensorrt"}  # licensed apart: not in the set
    for line in [*project["dependencies"], *(line for lines in extras.values() for line in lines)]:
        requirement = Requirement(line)
        version = pinned()[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), f"{line}: constraints.txt pins {version}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_is_executable_strict_and_valid(path: Path) -> None:
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", path], check=True, timeout=10)


def readme_commands() -> list[str]:
    """Every `python cli.py …` line of the README's code blocks, continuation lines joined."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip().removeprefix("$ ") for line in lines if line.strip().removeprefix("$ ").startswith("python cli.py ")]


def parse(app: typer.Typer, command_line: str) -> None:
    """Parse `python cli.py COMMAND …` as the app does, without running it; an unknown command, option or extra argument raises."""
    command_name, *arguments = shlex.split(command_line, comments=True)[2:]
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    command = group.commands[command_name]
    context = command.context_class(command, info_name=command_name, resilient_parsing=True)  # resilient: paths need not exist here
    _, left, _ = command.make_parser(context).parse_args(arguments)
    assert not left, f"{command_line}: unexpected {left}"


def test_readme_commands_are_known() -> None:
    cli = pytest.importorskip("cli", reason="cli.py is not written yet")
    commands = readme_commands()
    assert commands, "README.md shows no command"
    for command in commands:
        parse(cli.app, command)


@pytest.fixture
def toy_app() -> typer.Typer:
    app = typer.Typer()

    @app.command()
    def build(artifact: Annotated[Path, typer.Argument(exists=True)], max_batch: int = 4) -> None: ...

    @app.command()
    def doctor() -> None: ...

    return app


def test_parse_takes_a_known_command(toy_app: typer.Typer) -> None:
    parse(toy_app, "python cli.py build artifacts/nowhere --max-batch 8  # a comment")


@pytest.mark.parametrize("command", ["bild x", "build x --max-bach 8", "build x y", "build x --max-batch"])
def test_parse_refuses_an_unknown_word(toy_app: typer.Typer, command: str) -> None:
    with pytest.raises(Exception, match=r"bild|max-bach|unexpected \['y'\]|max-batch"):
        parse(toy_app, f"python cli.py {command}")
