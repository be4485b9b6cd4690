"""The import arrows between the rooms, read from the source of every file; the checker itself is tried on snippets that break them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STEPS = frozenset({"artifact", "exporter", "graphs", "engines", "validation"})
ROOMS = STEPS | {"commands"}
MAY_IMPORT = {
    "artifact": frozenset({"artifact"}),
    "exporter": frozenset({"artifact", "exporter"}),
    "graphs": frozenset({"artifact", "graphs"}),
    "engines": frozenset({"artifact", "engines"}),
    "validation": STEPS,
    "commands": ROOMS,
    "cli": ROOMS,
}
TORCH_FREE = frozenset({"artifact", "graphs", "engines"})
TORCH = frozenset({"torch", "transformers"})
USER_FACING = frozenset({"typer", "rich", "click"})
FILES = sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")) + [
    path.relative_to(ROOT) for path in (ROOT / "cli.py",) if path.exists()
]


def imported_modules(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import: statements anywhere in the file, and import_module or __import__ of a literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")
        elif isinstance(node, ast.Call) and called_name(node) in {"import_module", "__import__"} and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, argument.value


def called_name(call: ast.Call) -> str:
    """`print` of `print(…)`, `import_module` of `importlib.import_module(…)`."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def refusal(room: str, module: str) -> str | None:
    """Why a file of ``room`` may not import ``module``; None if it may."""
    top = module.split(".", maxsplit=1)[0]
    if module.startswith("."):
        return "relative import"
    if top in ROOMS and top not in MAY_IMPORT[room]:
        return f"{room} does not import {top}"
    if top in {"cli", "tests"}:
        return f"nothing imports {top}"
    if top in TORCH and room in TORCH_FREE:
        return f"{room} works without {top}"
    if top in USER_FACING and room != "cli":
        return f"only cli.py imports {top}"
    return None


def violations(source: str, path: Path) -> list[str]:
    """Every broken rule of one file, as `path:line: imported name: reason`."""
    tree = ast.parse(source)
    room = path.parts[0].removesuffix(".py")
    found = [f"{path}:{line}: {module}: {reason}" for line, module in imported_modules(tree) if (reason := refusal(room, module))]
    if room != "cli":
        prints = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print")
        found += [f"{path}:{node.lineno}: print: a package returns or logs" for node in prints]
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_follow_the_arrows(path: Path) -> None:
    assert violations((ROOT / path).read_text(encoding="utf-8"), path) == []


def test_every_room_is_checked() -> None:
    assert {path.parts[0] for path in FILES} >= ROOMS


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("artifact/a.py", "import torch", "artifact works without torch"),
        ("graphs/a.py", "from torch.nn import Module", "graphs works without torch"),
        ("engines/backends/a.py", "import transformers.models", "engines works without transformers"),
        ("artifact/a.py", "from graphs import pipeline", "artifact does not import graphs"),
        ("graphs/fusions/a.py", "import exporter.stamp", "graphs does not import exporter"),
        ("engines/a.py", "def f():\n    from validation.parity import validate", "engines does not import validation"),
        ("exporter/a.py", "if TYPE_CHECKING:\n    import graphs.diff", "exporter does not import graphs"),
        ("graphs/a.py", "importlib.import_module('torch.onnx')", "graphs works without torch"),
        ("graphs/a.py", "__import__('engines')", "graphs does not import engines"),
        ("validation/a.py", "import rich.table", "only cli.py imports rich"),
        ("exporter/a.py", "from typer import Exit", "only cli.py imports typer"),
        ("validation/a.py", "import cli", "nothing imports cli"),
        ("validation/a.py", "from commands import run", "validation does not import commands"),
        ("graphs/fusions/a.py", "from . import rope", "relative import"),
        ("validation/render/a.py", "print('x')", "a package returns or logs"),
    ],
)
def test_checker_finds_a_broken_rule(path: str, source: str, reason: str) -> None:
    (found,) = violations(source, Path(path))
    assert found.endswith(reason)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("exporter/a.py", "import torch\nfrom artifact.errors import ExportError\nfrom exporter import rope"),
        ("validation/a.py", "from graphs import diff\nfrom engines import audit\nimport transformers"),
        ("graphs/a.py", "import torchless\nimport onnx_ir\nlogger.print('x')"),
        ("cli.py", "import typer, rich.table\nfrom validation import parity\nprint('x')"),
    ],
)
def test_checker_lets_a_legal_file_pass(path: str, source: str) -> None:
    assert violations(source, Path(path)) == []
