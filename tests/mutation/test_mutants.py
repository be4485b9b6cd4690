"""What scripts/mutate changes, and that it tells a tested condition from an untested one."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FUSIONS = ROOT / "graphs" / "fusions"


@pytest.fixture(scope="module")
def tool():
    """The modules beside this file, which can't be imported as part of a package."""
    sys.path.insert(0, str(Path(__file__).parent))
    yield {name: importlib.import_module(name) for name in ("mutants", "report")}
    sys.path.remove(str(Path(__file__).parent))


@pytest.mark.parametrize(
    ("source", "changed"),
    [
        ("if a: b()", ["if not a: b()"]),
        ("if not a: b()", ["if a: b()"]),
        ("c = a and b and d", ["c = b and d", "c = a and d", "c = a and b"]),
        ("c = a or b", ["c = b", "c = a"]),
        ("c = a == b", ["c = a != b"]),
        ("c = a < b <= d", ["c = a <= b <= d", "c = a < b < d"]),
        ("c = a is None", ["c = a is not None"]),
        ("c = a in b", ["c = a not in b"]),
        ("c = [a for a in b if a]", ["c = [a for a in b if not a]"]),
        ("c = 'Cast', 'two words', 1, 0.5, True", [f"c = {text}" for text in (
            "'Cast_', 'two words', 1, 0.5, True", "'Cast', 'two words', 2, 0.5, True", "'Cast', 'two words', 1, 1.5, True",
            "'Cast', 'two words', 1, 0.5, False")]),
        ("c = a + b", ["c = a - b"]),
        ("c = any(a)", ["c = all(a)"]),
        ("tape.add(a, like=b, axis=d, to=e)", ["tape.add(a, like=b, to=e)", "tape.add(a, like=b, axis=d)"]),
        ("op.Cast(a, to=d)", ["op.Cast(a)"]),
        ("lower(a, to=d)", []),
        ("raise Refused(f'no {a}')", ["if False: raise Refused(f'no {a}')"]),
        ("def f():\n  yield a", ["def f():\n  if False:\n    yield a"]),
        ("def f():\n  return a, f'no {b}'", ["def f():\n  return a, ''"]),
        ("def f():\n  return 'not this'", ["def f():\n  return ''"]),
        ("def f(a: 1) -> 2:\n  '''Words.'''\n  assert a == 3", []),
        ("c = zip(a, b, strict=True)", []),
        ("@d(frozen=True)\nclass A: pass", []),
    ],
)  # fmt: skip
def test_changes_each_in_turn(tool, source, changed) -> None:
    found = []
    for number in range(len(list(tool["mutants"].find_mutants(ast.parse(source), source)))):
        tree = ast.parse(source)
        list(tool["mutants"].find_mutants(tree, source))[number].apply()
        found.append(ast.unparse(tree))
    assert sorted(found) == sorted(ast.unparse(ast.parse(one)) for one in changed)


def test_mutants_of_one_line_are_told_apart(tool) -> None:
    changes = [mutant.change for mutant in tool["mutants"].find_mutants(ast.parse("a = 1, 1"), "a = 1, 1")]
    assert changes == ["a = 1, 1 ⟶ 1 → 2", "a = 1, 1 ⟶ 1 → 2 (no. 2)"]


def test_every_mutant_called_equivalent_is_one_that_there_is(tool) -> None:
    there = set()
    for path in FUSIONS.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        there |= {(path.name, mutant.where, mutant.change) for mutant in tool["mutants"].find_mutants(ast.parse(source), source)}
    known = tool["report"].equivalents()
    assert [key for key in known if key not in there] == []
    assert all(len(reason) > 10 for reason in known.values())


def test_notices_what_is_tested_and_lists_what_is_not(tmp_path) -> None:
    """A project of one fusion with two conditions, of which one is tested."""
    for folder in ("graphs/fusions", "graphs/foreign", "tests/graphs/fusions", "tests/mutation", "docs"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("mutants.py", "report.py", "run.py"):
        (tmp_path / "tests/mutation" / name).write_text((Path(__file__).parent / name).read_text(encoding="utf-8"), encoding="utf-8")
    reason = 'file = "toy.py"\nwhere = "small"\nchanges = ["return a < 3 ⟶ 3 → 4"]\nreason = "to show that such a line is taken"\n'
    files = {
        "tests/mutation/equivalent.toml": f"[[equivalent]]\n{reason}",
        "graphs/fusions/toy.py": "def small(a):\n    return a < 3\n",
        "tests/graphs/fusions/test_toy.py": "from graphs.fusions.toy import small\ndef test_small():\n    assert small(2) and not small(9)\n",
        "graphs/pipeline.py": "",
        "graphs/foreign/fuse.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    result = subprocess.run([sys.executable, "tests/mutation/run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (1, "")
    assert "toy.py:2 small [comparison]\n    return a < 3 ⟶ a < 3 → a <= 3\n" in result.stdout
    document = (tmp_path / "docs" / "mutation.md").read_text(encoding="utf-8")
    assert "| toy.py | 2 | 1 | 1 | 0 | 1 | 1 |" in document
    assert "| toy.py | small | `return a < 3 ⟶ 3 → 4` | to show that such a line is taken |" in document
    (tmp_path / "tests/graphs/fusions/test_toy.py").write_text("def test_fails():\n    assert False\n", encoding="utf-8")
    failed = subprocess.run([sys.executable, "tests/mutation/run.py", "toy"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert failed.returncode == 1
    assert "error: the tests of toy.py fail, or there are none" in failed.stderr
