"""Three English texts that are wherever this project is installed, and that nothing was calibrated on.

- *language reference*: what Python's ``help()`` prints of keywords, operators and types (``pydoc_data.topics``)
- *docstrings*: of modules, classes and functions of Python's standard library, as ``pydoc`` reads them
- *licences*: of NumPy and PyTorch with all they bundle: legal prose

The first two change with Python's release, the third with the pinned packages (constraints.txt); figures name both.
"""

from __future__ import annotations

import importlib
import pydoc
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import files
from types import ModuleType

MODULES = (
    "argparse asyncio collections configparser csv dataclasses datetime decimal difflib email.message fractions functools heapq http.client imaplib "
    "inspect itertools json locale logging mailbox multiprocessing.pool optparse os pathlib pickle plistlib random re shelve shutil smtplib sqlite3 "
    "statistics string subprocess tarfile tempfile textwrap threading timeit trace types typing unittest unittest.mock urllib.request uuid warnings "
    "wave weakref zipfile"
).split()
LEAST_DOCSTRING = 200
"""Characters: shorter ones repeat each other."""


def language_reference() -> str:
    """Python's own pages on its language, in the order of their names."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def docstrings() -> str:
    """The longer docstrings of some modules, each once."""
    found = (text for name in MODULES for text in _docstrings(importlib.import_module(name)))
    return "\n\n".join(dict.fromkeys(text for text in found if len(text) > LEAST_DOCSTRING))


def licences() -> str:
    """NumPy's and PyTorch's."""
    found = [file for package in ("numpy", "torch") for file in files(package) or [] if file.parent.name == "licenses"]
    return "\n".join(file.locate().read_text(encoding="utf-8", errors="replace") for file in found)  # type: ignore[attr-defined]


TEXTS: Mapping[str, Callable[[], str]] = {"language reference": language_reference, "docstrings": docstrings, "licences": licences}


def _docstrings(module: ModuleType) -> Iterator[str]:
    yield pydoc.getdoc(module)
    for _, member in sorted(vars(module).items()):
        if getattr(member, "__module__", None) != module.__name__ or not callable(member):
            continue
        yield pydoc.getdoc(member)
        public = sorted((name, inner) for name, inner in vars(member).items() if not name.startswith("_")) if isinstance(member, type) else []
        yield from (pydoc.getdoc(inner) for _, inner in public if callable(inner))
