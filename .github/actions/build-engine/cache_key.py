"""The cache key of an artifact, for a workflow's ``$GITHUB_OUTPUT``: a hash of what decides its bytes.

``key`` is of the checkpoint's content, every option and every source file; ``restore-key``, its prefix, of all but the sources: what an older toolkit
made of the same checkpoint and options is a start that `run` carries on from, an artifact of other options is another one, with other engines in it.
Reads the options from the environment, as the action gives them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from artifact.errors import ToolkitError  # noqa: E402
from artifact.steps import rules_hash  # noqa: E402
from commands.inspect import inspect  # noqa: E402

CHECKPOINT = ("CHECKPOINT", "SIZE", "REVISION")
OPTIONS = ("PRECISIONS", "TARGET", "MAX_BATCH", "MAX_LENGTH")
SOURCES = (*(f"{room}/**/*" for room in ("artifact", "exporter", "graphs", "engines", "validation", "commands")), "cli.py", "constraints.txt")
CONTENT = ("fingerprint", "revision", "repository")
"""What `inspect` says of a checkpoint that tells one content from another: of files here, of a model on the hub, of a published size."""


def cache_keys(environment: Mapping[str, str]) -> dict[str, str]:
    """``key`` and ``restore-key``."""
    asked = {name: environment.get(name, "") for name in (*CHECKPOINT, *OPTIONS)}
    first = f"llama2trt-{_digest({**asked, 'content': content_of(environment)})}-"
    return {"key": f"{first}{_digest(rules_hash(_files(SOURCES)))}", "restore-key": first}


def content_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Hash or commit of the checkpoint; empty for random weights, which their name says whole."""
    source = environment.get("CHECKPOINT") or environment.get("SIZE", "")
    if not source or source.startswith("random"):
        return {}
    try:
        found = inspect(source)
        if "/" in str(found.get("repository", "")):  # a published size: what is there now
            found = inspect(found["repository"])
    except ToolkitError as error:  # the run will say so, with its hint
        print(f"cache key: {error}", file=sys.stderr)  # noqa: T201
        return {}
    return {key: str(found[key]) for key in CONTENT if key in found}


def _files(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The patterns' files, without what Python leaves between them."""
    found = {path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    return tuple(path.as_posix() for path in sorted(found) if "__pycache__" not in path.parts)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    for name, value in cache_keys(os.environ).items():
        print(f"{name}={value}")  # noqa: T201
