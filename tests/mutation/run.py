"""Run each fusion's tests against every mutant of it, and write down which survive (``scripts/mutate``; not part of ``scripts/test``).

    scripts/mutate                       all files of graphs/fusions, then docs/mutation.md; exit code 1 if a mutant survives
    scripts/mutate rotary attention      these files; docs/mutation.md stays as it is
    scripts/mutate --again               also files that were done before, and have not changed since, nor have their tests

A mutant is a process forked from one that has the libraries loaded; it compiles the changed file in memory, so the working tree is never touched.
A file's tests are tests/graphs/fusions/test_<file>.py; a file that others share (_reading.py) is tested by the tests of all files that import it.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import importlib.abc
import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

from mutants import Mutant, find_mutants  # noqa: E402
from report import Outcome, equivalents, print_survivors, write_report  # noqa: E402

FUSIONS = ROOT / "graphs" / "fusions"
TESTS = ROOT / "tests" / "graphs" / "fusions"
QUICK = ("-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:unraisableexception")
SECONDS, BYTES = 30, 8 * 2**30
"""A mutant that loops, or fills the memory, is a mutant that its tests noticed."""


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a tree instead of its file."""

    def __init__(self, path: Path, tree: ast.Module) -> None:
        self.name, self.path, self.tree = f"graphs.fusions.{path.stem}", path, tree

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Called by the import system."""
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None

    def create_module(self, spec: Any) -> None:
        """The usual kind of module."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the tree."""
        exec(compile(self.tree, self.path, "exec"), module.__dict__)


def tests_of(path: Path) -> list[str]:
    """The test files of a fusion, or of all fusions that import a shared file, directly or through another shared one."""
    found = {TESTS / f"test_{path.name}"} if (TESTS / f"test_{path.name}").is_file() else set()
    if path.name.startswith("_"):
        importers = [one for one in FUSIONS.glob("*.py") if f"graphs.fusions.{path.stem} " in one.read_text(encoding="utf-8")]
        found |= {Path(test) for importer in importers for test in tests_of(importer)}
    return sorted(map(str, found))


def preload() -> None:
    """Import what no mutant changes; the graphs room itself is imported anew by each."""
    import numpy.testing  # noqa: F401
    import onnxruntime  # noqa: F401
    import pytest  # noqa: F401

    import graphs.foreign.fuse
    import graphs.pipeline  # noqa: F401

    for name in [name for name in sys.modules if name.partition(".")[0] == "graphs"]:
        del sys.modules[name]
    gc.freeze()  # what is loaded is shared by all processes, and never collected


def start(path: Path, mutant: Mutant | None, tree: ast.Module) -> int:
    """Fork a process that runs the tests of a file with one change in it; its exit code is pytest's."""
    process = os.fork()
    if process:
        return process
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))  # not the clock's: the machine may be busy
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        if mutant is not None:
            mutant.apply()
        sys.meta_path.insert(0, Changed(path, tree))
        import pytest

        code = int(pytest.main([*tests_of(path), *QUICK, "--basetemp", f"{os.environ['MUTATE_TEMP']}/{os.getpid()}"]))
    except BaseException:  # what kills pytest itself is noticed too
        code = 1
    os._exit(code)


def run_file(path: Path, jobs: int) -> Iterator[tuple[Mutant, bool]]:
    """Each mutant of a file, and whether its tests noticed.

    Raises:
        SystemExit: the tests fail without any change.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    waiting = list(find_mutants(tree, path.read_text(encoding="utf-8")))
    if waiting and os.waitpid(start(path, None, tree), 0)[1] != 0:
        raise SystemExit(f"error: the tests of {path.name} fail, or there are none\nhint: pytest {' '.join(tests_of(path))}")
    running: dict[int, Mutant] = {}
    for mutant in [*waiting, *[None] * jobs]:
        if len(running) == jobs or mutant is None:
            if not running:
                break
            process, status = os.waitpid(-1, 0)
            yield running.pop(process), status != 0
        if mutant is not None:
            running[start(path, mutant, tree)] = mutant


def remembered(path: Path) -> Path:
    """Where the result of a file is kept, under a name that changes with it, its tests, the files that it shares and these here."""
    read = [path, *sorted(FUSIONS.glob("_*.py")), *map(Path, tests_of(path)), TESTS / "conftest.py", Path(__file__).parent / "mutants.py"]
    digest = hashlib.sha256(b"\0".join(one.read_bytes() for one in read if one.is_file())).hexdigest()
    return ROOT / ".mutation" / f"{path.stem}-{digest[:16]}.json"


def results_of(path: Path, jobs: int, again: bool) -> list[tuple[Mutant, bool]]:
    """Each mutant of a file and whether its tests noticed, as run now or remembered."""
    kept, source = remembered(path), path.read_text(encoding="utf-8")
    if kept.is_file() and not again:
        return list(zip(find_mutants(ast.parse(source), source), json.loads(kept.read_text()), strict=True))
    results = list(run_file(path, jobs))
    kept.parent.mkdir(exist_ok=True)
    in_order = {mutant.change + mutant.where: noticed for mutant, noticed in results}
    kept.write_text(json.dumps([in_order[mutant.change + mutant.where] for mutant in find_mutants(ast.parse(source), source)]))
    return results


def main(arguments: Sequence[str]) -> int:
    """All of it; 1 if a mutant survives that is not known to be equivalent."""
    parser = argparse.ArgumentParser(prog="scripts/mutate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="names of files of graphs/fusions, without .py")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--again", action="store_true", help="run what is remembered too")
    asked = parser.parse_args(arguments)
    paths = [FUSIONS / f"{name}.py" for name in asked.files] or sorted(FUSIONS.glob("*.py"))
    preload()
    known, outcomes = equivalents(), []
    for path in paths:
        began = time.perf_counter()
        results = results_of(path, asked.jobs, asked.again)
        outcome = Outcome.of(path.name, results, known)
        sys.stdout.write(f"{outcome.line()}  {time.perf_counter() - began:.0f} s\n")
        print_survivors(outcome)
        sys.stdout.flush()
        if outcome.mutants:
            outcomes.append(outcome)
    if not asked.files:
        write_report(outcomes, known)
    return int(any(outcome.survived for outcome in outcomes))


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.environ["MUTATE_TEMP"] = folder
        code = main(sys.argv[1:])
    sys.exit(code)
